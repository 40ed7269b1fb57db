// Renders the templates of a chart as Helm does, with the functions of Helm that our chart uses, so that the chart can be
// tested where Helm cannot be installed. Reads {"templates": {file: text}, "data": {"Values": …}} and writes {file: text}.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"text/template"
)

type request struct {
	Templates map[string]string `json:"templates"`
	Data      map[string]any    `json:"data"`
}

func isEmpty(value any) bool {
	truth, ok := template.IsTrue(value)
	return !ok || !truth
}

func indent(count int, text string) string {
	pad := strings.Repeat(" ", count)
	return pad + strings.ReplaceAll(text, "\n", "\n"+pad)
}

func functions(root *template.Template) template.FuncMap {
	return template.FuncMap{
		"include": func(name string, data any) (string, error) {
			var out bytes.Buffer
			err := root.ExecuteTemplate(&out, name, data)
			return out.String(), err
		},
		// JSON is YAML, too.
		"toYaml": func(value any) (string, error) {
			text, err := json.Marshal(value)
			return string(text), err
		},
		"nindent": func(count int, text string) string { return "\n" + indent(count, text) },
		"quote":   func(value any) string { return fmt.Sprintf("%q", fmt.Sprint(value)) },
		"default": func(otherwise, value any) any {
			if isEmpty(value) {
				return otherwise
			}
			return value
		},
		"required": func(message string, value any) (any, error) {
			if isEmpty(value) {
				return nil, errors.New(message)
			}
			return value, nil
		},
		"fail":       func(message string) (string, error) { return "", errors.New(message) },
		"contains":   func(part, whole string) bool { return strings.Contains(whole, part) },
		"trimSuffix": func(suffix, text string) string { return strings.TrimSuffix(text, suffix) },
		"trunc": func(count int, text string) string {
			if len(text) > count {
				return text[:count]
			}
			return text
		},
		"int": func(value any) int {
			number := reflect.ValueOf(value)
			if number.CanFloat() {
				return int(number.Float())
			}
			return int(number.Int())
		},
		"ternary": func(yes, no any, condition bool) any {
			if condition {
				return yes
			}
			return no
		},
		"dict": func(pairs ...any) map[string]any {
			made := map[string]any{}
			for place := 0; place+1 < len(pairs); place += 2 {
				made[pairs[place].(string)] = pairs[place+1]
			}
			return made
		},
	}
}

func render(asked request) (map[string]string, error) {
	root := template.New("chart").Option("missingkey=zero")
	root.Funcs(functions(root))
	for name, text := range asked.Templates {
		if _, err := root.New(name).Parse(text); err != nil {
			return nil, err
		}
	}
	rendered := map[string]string{}
	for name := range asked.Templates {
		if strings.HasPrefix(name, "_") {
			continue
		}
		var out bytes.Buffer
		if err := root.ExecuteTemplate(&out, name, asked.Data); err != nil {
			return nil, err
		}
		rendered[name] = out.String()
	}
	return rendered, nil
}

func main() {
	var asked request
	err := json.NewDecoder(os.Stdin).Decode(&asked)
	var rendered map[string]string
	if err == nil {
		rendered, err = render(asked)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
