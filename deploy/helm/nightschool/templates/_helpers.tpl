{{- define "nightschool.name" -}}
{{- if contains "nightschool" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-nightschool" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "nightschool.selector" -}}
app.kubernetes.io/name: nightschool
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nightschool.labels" -}}
{{ include "nightschool.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "nightschool.claim" -}}
{{- .Values.persistence.existingClaim | default (include "nightschool.name" .) -}}
{{- end -}}

{{/* What every pod has in common; its container is written where it is included. */}}
{{- define "nightschool.pod" -}}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: home
    persistentVolumeClaim: {claimName: {{ include "nightschool.claim" . }}}
  - name: tmp
    emptyDir: {}
  # Checkpoints pass through shared memory on their way to the disk.
  - name: shm
    emptyDir: {medium: Memory}
{{- end -}}

{{- define "nightschool.container" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
env:
  {{- range $name, $value := .Values.env }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
  {{- with .Values.database.existingSecret }}
  - name: DATABASE_URL
    valueFrom: {secretKeyRef: {name: {{ . }}, key: url}}
  {{- end }}
  {{- with .Values.apiKeys.existingSecret }}
  - name: NIGHTSCHOOL_API_KEY
    valueFrom: {secretKeyRef: {name: {{ . }}, key: api-keys}}
  {{- end }}
volumeMounts:
  - {name: home, mountPath: /app/models}
  - {name: tmp, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
{{- end -}}

{{/* Requests as given, and GPUs where there are any. */}}
{{- define "nightschool.resources" -}}
{{- if .resources.requests }}
requests: {{ toYaml .resources.requests | nindent 2 }}
{{- end }}
{{- if or .resources.limits .gpus }}
limits:
  {{- range $name, $value := .resources.limits }}
  {{ $name }}: {{ $value | quote }}
  {{- end }}
  {{- if .gpus }}
  nvidia.com/gpu: {{ .gpus }}
  {{- end }}
{{- end }}
{{- end -}}
