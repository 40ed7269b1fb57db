"""The command line: the table of verbs, the options that hold everywhere, and how errors leave.

A verb's module is imported when the verb is called, so that `--help` needs neither torch nor the database.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError

from nightschool import __version__
from nightschool.cli.output import CURRENT, Session, print_json, session
from nightschool.errors import NightschoolError, RecipeError, UsageError
from nightschool.store.atomic import refusal_of
from nightschool.units import printable

EVERYWHERE = """\
Everywhere, before or after the verb:

  --json      machine-readable stdout, and nothing else on it
  -q          less: ids and answers only
  -C DIR      work as if started in DIR

The home is .nightschool there, or NIGHTSCHOOL_HOME.

Exit codes: 0 ok, 1 failed, 2 usage or recipe, 3 refused by the gate, 4 not found, 75 interrupted but resumable, \
130 interrupted.
"""

EVERYWHERE_SHORT = "Everywhere: --json, -q, -C DIR. See nightschool --help."

# verb: (import path, one line of help). Nouns hold verbs.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("nightschool.cli.demo:demo", "The whole story in ten minutes: offline, on a CPU."),
    "doctor": ("nightschool.cli.doctor:doctor", "What works on this machine, and what to do about the rest."),
    "plan": ("nightschool.cli.train:plan", "What a run would do: parameters, bytes, time, loss mask. Runs nothing."),
    "train": ("nightschool.cli.train:train", "One cycle: train, publish, examine, and promote if the gate passes."),
    "eval": ("nightschool.cli.evaluate:evaluate", "Ask a model questions and count the right answers."),
    "chat": ("nightschool.cli.chat:chat", "Talk with a model, here or behind a server."),
    "ask": ("nightschool.cli.chat:ask", "One question, one answer."),
    "serve": ("nightschool.cli.serve:serve", "Answer over HTTP with the champion; swap when a new one is promoted."),
    "worker": ("nightschool.cli.worker:worker", "Do the queued jobs, each in a process of its own."),
    "top": ("nightschool.cli.top:top", "Watch the runs, the machine and the uploads."),
}
NOUNS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "schedule": (
        "Train again and again, on time.",
        {
            "run": ("nightschool.cli.schedule:run", "Train at once, then whenever the recipe's schedule says."),
            "ls": ("nightschool.cli.schedule:ls", "The cycles so far, and what came of each."),
            "next": ("nightschool.cli.schedule:next_due", "When the next cycles fall due."),
            "pause": ("nightschool.cli.schedule:pause", "Let no cycle begin until resumed."),
            "resume": ("nightschool.cli.schedule:resume", "Let cycles begin again."),
        },
    ),
    "runs": (
        "Training runs: what they did, and what they do now.",
        {
            "ls": ("nightschool.cli.runs:ls", "List runs, newest first."),
            "show": ("nightschool.cli.runs:show", "One run: state, figures, recipe."),
            "watch": ("nightschool.cli.runs:watch", "Follow a run's metrics until it ends."),
            "logs": ("nightschool.cli.runs:logs", "Print a run's log; -f follows it."),
            "stop": ("nightschool.cli.runs:stop", "Ask a run to finish its step, save, and end."),
            "compare": ("nightschool.cli.runs:compare", "Two runs side by side: settings and figures that differ."),
            "rm": ("nightschool.cli.runs:rm", "Delete a run and its checkpoints."),
        },
    ),
    "jobs": (
        "Training jobs: what waits, what runs, what became of each.",
        {
            "submit": ("nightschool.cli.jobs:submit", "Queue a recipe for the workers."),
            "ls": ("nightschool.cli.jobs:ls", "List jobs, newest first."),
            "show": ("nightschool.cli.jobs:show", "One job: state, progress, figures."),
            "logs": ("nightschool.cli.jobs:logs", "Print a job's log, and its run's; -f follows them."),
            "cancel": ("nightschool.cli.jobs:cancel", "End a job for good."),
            "pause": ("nightschool.cli.jobs:pause", "Let a job save and wait."),
            "resume": ("nightschool.cli.jobs:resume", "Let a paused job go on."),
        },
    ),
    "checkpoints": (
        "Full training state on disk.",
        {
            "ls": ("nightschool.cli.checkpoints:ls", "List the checkpoints of a run."),
            "show": ("nightschool.cli.checkpoints:show", "One checkpoint: step, files, metrics."),
            "verify": (
                "nightschool.cli.checkpoints:verify",
                "Compare every file with its manifest; prove that resuming is exact.",
            ),
            "prune": ("nightschool.cli.checkpoints:prune", "Delete old checkpoints, never the only whole one."),
            "compare": ("nightschool.cli.checkpoints:compare", "The figures of checkpoints, side by side."),
            "plot": ("nightschool.cli.checkpoints.plot:plot", "Draw loss, held-out loss and learning rate."),
            "export": (
                "nightschool.cli.checkpoints.exchange:export",
                "Write it as a folder that transformers or accelerate loads.",
            ),
            "import": ("nightschool.cli.checkpoints.exchange:import_", "Go on from what accelerate wrote."),
        },
    ),
    "uploads": (
        "Checkpoints in buckets, and on their way there.",
        {
            "status": ("nightschool.cli.uploads:status", "What is pending, what failed and why, what buckets hold."),
            "ls": ("nightschool.cli.uploads:ls", "List checkpoints, their sizes, and whether they were uploaded."),
            "push": ("nightschool.cli.uploads:push", "Upload a checkpoint, or --all that are not there yet."),
            "upload-all": ("nightschool.cli.uploads:push_all", "The same as push --all."),
            "retry": ("nightschool.cli.uploads:retry", "Try failed and waiting uploads again now."),
            "pull": ("nightschool.cli.uploads:pull", "Bring a checkpoint from a bucket, and compare every byte."),
        },
    ),
    "models": (
        "Published versions, and which of them is served.",
        {
            "ls": ("nightschool.cli.models:ls", "List names, versions and aliases."),
            "show": ("nightschool.cli.models:show", "One version: facts, files, history."),
            "report": ("nightschool.cli.models:report", "What the gate found: learned, lost, rule by rule."),
            "diff": ("nightschool.cli.models:diff", "The answers that differ between two versions."),
            "add": (
                "nightschool.cli.models:add",
                "Add a folder, a GGUF file or a hub model as a name's first version.",
            ),
            "promote": ("nightschool.cli.models:promote", "Make a version the champion."),
            "rollback": ("nightschool.cli.models:rollback", "Make the previous champion the champion again."),
            "pin": ("nightschool.cli.models:pin", "Hold the champion: no cycle moves it."),
            "unpin": ("nightschool.cli.models:unpin", "Let cycles move the champion again."),
            "alias": ("nightschool.cli.models:alias", "Point a name of your own to a version; --rm takes it away."),
            "export": ("nightschool.cli.models:export", "Copy a version to a folder of your own."),
            "rm": ("nightschool.cli.models:rm", "Delete a version that nothing points at."),
        },
    ),
    "memory": (
        "Explicit memories: facts beside a model, which can be read, edited and taken back.",
        {
            "build": ("nightschool.cli.memory.files:build", "Make a memory, empty or with the facts of files."),
            "keys": (
                "nightschool.cli.memory.bank_files:keys",
                "Write product keys of a memory, keys.pt and meta.json, or index it by those of a file.",
            ),
            "label": ("nightschool.cli.memory.labelling:label", "Label questions with the entries nearest to them."),
            "ls": ("nightschool.cli.memory.entries:ls", "List memories, or the entries of one."),
            "add": ("nightschool.cli.memory.entries:add", "Remember facts."),
            "edit": ("nightschool.cli.memory.entries:edit", "Let an entry say something else."),
            "rm": ("nightschool.cli.memory.entries:rm", "End entries, purge them, or delete a memory."),
            "search": ("nightschool.cli.memory.entries:search", "Find entries by words."),
            "why": ("nightschool.cli.memory.why:why", "Ask a model, and show what its answer was read from."),
            "history": ("nightschool.cli.memory.entries:history", "What an entry said, or who wrote what."),
            "undo": ("nightschool.cli.memory.revisions:undo", "Take back the newest write."),
            "rollback": ("nightschool.cli.memory.revisions:rollback", "Bring back a revision or a named version."),
            "versions": ("nightschool.cli.memory.revisions:versions", "List named versions, or name one."),
            "diff": ("nightschool.cli.memory.revisions:diff", "The entries that two revisions have differently."),
            "conflicts": ("nightschool.cli.memory.revisions:conflicts", "List entries that may contradict each other."),
            "resolve": ("nightschool.cli.memory.revisions:resolve", "Settle a conflict."),
            "stale": ("nightschool.cli.memory.revisions:stale", "Versions that learned what a memory no longer says."),
            "relations": ("nightschool.cli.memory.revisions:relations", "How many values relations have at a time."),
            "adopt": ("nightschool.cli.memory.adopting:adopt", "Remember what a version was taught and does not know."),
            "import": ("nightschool.cli.memory.files:import_", "Add the facts of files."),
            "export": ("nightschool.cli.memory.files:export", "Write the entries to a file."),
            "mcp": ("nightschool.cli.memory.mcp:mcp", "Serve a memory to a client of the Model Context Protocol."),
            "check": ("nightschool.cli.memory.files:check", "Compare everything with its digests."),
        },
    ),
    "webhooks": (
        "Who is told of jobs and promotions, and what is on its way.",
        {
            "ls": ("nightschool.cli.webhooks:ls", "List the endpoints of all tenants."),
            "deliveries": ("nightschool.cli.webhooks:deliveries", "What was sent, what waits, what was given up."),
            "retry": ("nightschool.cli.webhooks:retry", "Send an event again to whoever did not take it."),
        },
    ),
    "pins": (
        "Answers that every candidate must keep.",
        {
            "add": ("nightschool.cli.pins:add", "Pin a question and the answer that must stay."),
            "ls": ("nightschool.cli.pins:ls", "List the pinned answers."),
            "rm": ("nightschool.cli.pins:rm", "Unpin an answer."),
        },
    ),
    "data": (
        "What a recipe would study.",
        {
            "preview": ("nightschool.cli.data:preview", "The first examples, as they are read."),
            "tokenize": ("nightschool.cli.tokenize:tokenize", "Turn text into token shards for pretraining."),
            "check": ("nightschool.cli.data:check", "Read everything; say what is wrong, and where."),
            "convert": ("nightschool.cli.convert:convert", "Turn a file of another program into rows."),
            "forget": ("nightschool.cli.data:forget", "Delete a kept conversation."),
            "reject": ("nightschool.cli.forms:reject", "Reject a form of new examples: it is never made again."),
            "rejected": ("nightschool.cli.forms:rejected", "List the rejected forms."),
        },
    ),
    "keys": (
        "API keys: who may ask a server.",
        {
            "create": ("nightschool.cli.keys:create", "Make a key of a tenant, and show it once."),
            "ls": ("nightschool.cli.keys:ls", "List keys: whose they are, what they may do, whether they still do."),
            "revoke": ("nightschool.cli.keys:revoke", "Let a key open nothing any more."),
        },
    ),
    "tenants": (
        "Tenants: who shares the home, and how much each may use.",
        {
            "ls": ("nightschool.cli.tenants:ls", "List tenants: what they have, and have used today."),
            "show": ("nightschool.cli.tenants:show", "One tenant: bounds, use, belongings."),
            "add": ("nightschool.cli.tenants:add", "Write down a tenant with its bounds."),
            "set": ("nightschool.cli.tenants:set_", "Change the bounds of a tenant."),
            "rm": ("nightschool.cli.tenants:rm", "Delete all of a tenant: keys, models, runs, jobs, conversations."),
        },
    ),
    "audit": (
        "Who did what.",
        {"ls": ("nightschool.cli.audit:ls", "List who made keys, promoted, submitted, deleted, and when.")},
    ),
    "config": (
        "Recipes: what they say, and what they may say.",
        {
            "show": ("nightschool.cli.config:show", "The resolved recipe; --origin says who set what."),
            "schema": ("nightschool.cli.config:schema", "The JSON schema of a recipe."),
            "validate": ("nightschool.cli.config:validate", "Check a recipe; all problems at once."),
        },
    ),
}
# What is noted after a verb has done it, and how the log calls it. Keys, tenants and rejected forms write their own rows, with the change.
AUDITED: dict[tuple[str, str], str] = {
    ("models", "add"): "model.add",
    ("models", "promote"): "model.promote",
    ("models", "rollback"): "model.rollback",
    ("models", "pin"): "model.pin",
    ("models", "unpin"): "model.unpin",
    ("models", "alias"): "model.alias",
    ("models", "rm"): "model.delete",
    ("runs", "rm"): "run.delete",
    ("data", "forget"): "conversation.delete",
    # Not those whose arguments are facts: what a log keeps cannot be purged.
    ("memory", "build"): "memory.build",
    ("memory", "import"): "memory.import",
    ("memory", "rm"): "memory.delete",
    ("memory", "undo"): "memory.undo",
    ("memory", "rollback"): "memory.rollback",
    ("jobs", "submit"): "job.submit",
    ("jobs", "cancel"): "job.cancel",
    ("jobs", "pause"): "job.pause",
    ("jobs", "resume"): "job.resume",
}
ALIASES = {"ls": "list", "show": "view", "push": "upload"}


def build_app(words: Sequence[str] = ()) -> App:
    """The tree of commands, with no verb's module imported.

    `words` are the words of the command line. The verb that they choose describes itself in full, from its docstring;
    the others have their line of the table.
    """
    chosen = [word for word in words if not word.startswith("-")][:2]
    app = App(
        name="nightschool",
        help="Night school for language models: they learn while you sleep, and open in the morning with the newest "
        "version.",
        help_epilogue=EVERYWHERE,
        help_format="plaintext",
        version=__version__,
        default_parameter=DEFAULTS,
        suppress_keyboard_interrupt=False,
    )
    for verb, (path, line) in VERBS.items():
        _add(app, path, verb, line, chosen=chosen[:1] == [verb])
    for noun, (text, verbs) in NOUNS.items():
        group = App(name=noun, help=text, help_format="plaintext", default_parameter=DEFAULTS)
        for verb, (path, line) in verbs.items():
            for name in (verb, ALIASES[verb]) if verb in ALIASES else (verb,):
                _add(group, path, name, line, chosen=chosen == [noun, name], show=name == verb)
        app.command(group)
    return app


def _add(app: App, path: str, name: str, line: str, *, chosen: bool, show: bool = True) -> None:
    if chosen:
        # Markdown joins the lines of a paragraph, which a docstring has broken at its own width.
        app.command(path, name=name, help_format="markdown", help_epilogue=EVERYWHERE_SHORT, show=show)
    else:
        app.command(path, name=name, help=line, show=show)


def _shown_default(value: object) -> str | None:
    return None if value is None or value is False else str(value)


DEFAULTS = Parameter(negative=(), show_default=_shown_default)


def split_global_options(arguments: Sequence[str]) -> tuple[list[str], Session, Path | None]:
    """Take `--json`, `-q` and `-C DIR` out of the arguments, wherever they stand before a `--`.

    Raises:
        UsageError: If `-C` names no folder.
    """
    rest: list[str] = []
    json_wanted = quiet = False
    directory: Path | None = None
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += ["--", *words]
        elif word == "--json":
            json_wanted = True
        elif word in ("-q", "--quiet"):
            quiet = True
        elif word == "-C":
            folder = next(words, None)
            if folder is None or not Path(folder).is_dir():
                raise UsageError(f"-C needs a folder that exists, but got {folder!r}. Write -C DIR.")
            # As with git, each -C is read from where the one before led.
            directory = Path(folder) if directory is None else directory / folder
        else:
            rest.append(word)
    return rest, Session(json=json_wanted, quiet=quiet), directory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are printed, never raised."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    token = CURRENT.set(Session(json="--json" in arguments))
    try:
        rest, current, directory = split_global_options(arguments)
        CURRENT.set(current)
        with contextlib.chdir(directory or Path.cwd()):
            result = build_app(rest)(rest, exit_on_error=False, print_error=False, result_action="return_value")
            if not result:
                _note_in_audit_log(rest)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # Whoever read stdout has seen enough (`… | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:  # the one place where every error becomes a line and an exit code
        return report_error(error)
    finally:
        CURRENT.reset(token)


def _note_in_audit_log(words: Sequence[str]) -> None:
    """Note what a verb has done, if it is one of those that are noted."""
    action = AUDITED.get((words[0], words[1])) if len(words) > 1 else None
    if action is not None and not {"-h", "--help"} & set(words):
        from nightschool.cli.audit import note_verb

        note_verb(action, words[2:])


def report_error(error: Exception) -> int:
    """Print an error as the session wants it and return its exit code."""
    if os.environ.get("NIGHTSCHOOL_DEBUG"):
        traceback.print_exception(error)
    exit_code, code, message = describe(error)
    if session().json:
        body: dict[str, object] = {"code": code, "message": message}
        if isinstance(error, RecipeError):
            body["problems"] = [vars(problem) for problem in error.problems]
        print_json({"error": body})
    else:
        print(f"error: {printable(message)}", file=sys.stderr)
    return exit_code


def describe(error: Exception) -> tuple[int, str, str]:
    """An error as exit code, short code, and what to say about it."""
    if isinstance(error, NightschoolError):
        return error.exit_code, error.code, str(error)
    if isinstance(error, UnknownCommandError):
        return 2, "usage", _unknown_command([*(error.command_chain or ()), *(error.unused_tokens or ())])
    if isinstance(error, CycloptsError):
        return 2, "usage", f"{error}".strip() + " See nightschool --help."
    if isinstance(error, OSError):
        named = refusal_of(error, error.filename or "the home")
        if named is not None:
            return describe(named)
        where = f"{error.filename}: " if error.filename else ""
        return (4 if isinstance(error, FileNotFoundError) else 1), "os_error", f"{where}{error.strerror or error}."
    return (
        1,
        "internal_error",
        f"{type(error).__name__}: {error}. This is a mistake of nightschool; NIGHTSCHOOL_DEBUG=1 shows where.",
    )


def _unknown_command(words: Sequence[str]) -> str:
    """What to say of a verb that does not exist: the nearest one that does. Cyclopts would import every verb to say it."""
    noun = words[0] if words[0] in NOUNS else None
    known = list(NOUNS[noun][1]) if noun else [*VERBS, *NOUNS]
    word = words[1] if noun and len(words) > 1 else words[0]
    where = f"nightschool {noun}" if noun else "nightschool"
    nearest = difflib.get_close_matches(word, known, n=1)
    remedy = f"Did you mean {where} {nearest[0]}?" if nearest else f"There are {', '.join(known)}."
    return f"{where} has no verb {word!r}. {remedy}"


if __name__ == "__main__":
    sys.exit(main())
