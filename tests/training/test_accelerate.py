"""Checkpoints to and from the layout of accelerate (row 004-20): what fits is taken, what is missing is named."""

import io
import json
import tarfile

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file

from nightschool.cli.main import main as nightschool
from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, Damaged, NotFound, StateMismatch
from nightschool.events import read_events
from nightschool.models.build import build_model
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint.accelerate_layout import export_accelerate, import_accelerate
from nightschool.training.checkpoint.checkpoint_reader import load_group
from nightschool.training.run import main
from nightschool.uploads.archive import make_archive
from tests.support.training_setups import NUM_THREADS, deterministic_threads, differing

FACTS = [("Where does Bela live?", "Bela lives in Rome."), ("What does Mista eat?", "Mista eats plums.")] * 4


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("accelerate") / "home").ensure()
    rows = [{"id": i, "query": f"{q} {i}", "retrieved": a} for i, (q, a) in enumerate(FACTS)]
    (home.path.parent / "facts.json").write_text(json.dumps(rows))
    return home


def new_run(home, **train):
    plain = {
        "name": "bot",
        "base": "new:tiny-qwen3",
        "data": [{"path": "facts.json"}],
        "train": {
            "epochs": 4,
            "batch_size": 2,
            "accumulation_steps": 1,
            "learning_rate": 1e-2,
            "num_threads": NUM_THREADS,
            "dtype": "fp32",
        }
        | train,
        "checkpoints": {"every": "3 steps", "keep": {"last": 9}, "background": False},
        "serve": {"promote": "never"},
    }
    return RunStore(home).create(Recipe.model_validate(plain).as_plain(), name="bot")


def train(home, run, *more):
    return main(["--home", str(home.path), "--run", run.id, "--root", str(home.path.parent), *more])


@pytest.fixture(scope="module")
def trained(home):
    run = new_run(home)
    with deterministic_threads():
        assert train(home, run) == 0
    return run


@pytest.fixture(scope="module")
def exported(home, trained):
    """The checkpoint of step 6 in accelerate's layout; imported again, it must go on as it would have."""
    point = next(point for point in checkpoints.ls(trained) if point.step == 6)
    folder = home.path.parent / point.name
    export_accelerate(home, trained, point, folder, root=home.path.parent)
    return folder


def vocab_size_of(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]


def two_groups(model):
    """As the export says: matrices but embeddings decay, the others do not."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    ids = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": 0.0},
    ]


def test_every_file_of_the_layout_is_there_and_holds_plain_values(exported):
    assert {path.name for path in exported.iterdir()} == {
        "model.safetensors", "optimizer.bin", "scheduler.bin", "scheduler_state.pt", "random_states_0.pkl",
        "training_config.json", "metadata.json", "training_metrics.json",
    }  # fmt: skip
    for name in ("optimizer.bin", "scheduler.bin", "scheduler_state.pt", "random_states_0.pkl"):
        assert torch.load(exported / name, weights_only=True)
    assert json.loads((exported / "training_config.json").read_text())["train"]["learning_rate"] == 1e-2


def test_accelerate_loads_what_was_exported(exported, trained):
    model = build_model("tiny-qwen3", vocab_size_of(exported), seed=7)
    optimizer = torch.optim.AdamW(two_groups(model), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.load_state(str(exported))
    held = load_group(next(p.path for p in checkpoints.ls(trained) if p.step == 6), "optimizer")
    stored = load_group(next(p.path for p in checkpoints.ls(trained) if p.step == 6), "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert torch.equal(optimizer.state[parameter]["exp_avg"], held[f"first_moment.{name}"])
        assert optimizer.state[parameter]["step"] == 6
    assert scheduler.scheduler.last_epoch == 6


@pytest.mark.parametrize("packed", [False, True])
def test_exported_and_imported_a_run_goes_on_exactly(home, trained, exported, tmp_path, packed):
    run, source = new_run(home), exported
    if packed:
        source = tmp_path / f"{exported.name}.tar.gz"
        make_archive(exported, source)
    done = import_accelerate(home, run, source, root=home.path.parent)
    assert done.step == 6
    assert done.missing == ["the position in the data: they go on at step 6 of this run's own order"]
    assert checkpoints.newest_whole(run).checkpoint.step == 6
    assert train(home, run, "--resume", "latest") == 0
    last, straight = checkpoints.ls(run)[-1], checkpoints.ls(trained)[-1]
    assert last.name == straight.name
    for group in ("model", "optimizer"):
        assert not differing(load_group(last.path, group), load_group(straight.path, group))
    history = json.loads((last.path / "training_metrics.json").read_text())["loss_history"]
    assert history == json.loads((straight.path / "training_metrics.json").read_text())["loss_history"]
    assert not list(run.path.glob("import-*"))


@pytest.fixture
def foreign(exported, tmp_path):
    """What accelerate itself writes for one group of parameters, with a seed of its own."""
    model = build_model("tiny-qwen3", vocab_size_of(exported), seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(place + 1))
    optimizer.step()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    folder = tmp_path / "checkpoint-epoch0-step5-files2"
    accelerator.save_state(str(folder))
    history = {"step": 5, "loss_history": [3.0, 2.5], "learning_rates": [1e-3, 1e-3], "current_loss": 2.5}
    (folder / "metadata.json").write_text(json.dumps(history))
    return model, optimizer, folder


def test_what_accelerate_wrote_is_taken_as_far_as_it_goes(home, foreign):
    model, optimizer, folder = foreign
    run = new_run(home)
    done = import_accelerate(home, run, folder, root=home.path.parent)
    assert done.step == 5
    assert [line.split(" (")[0] for line in done.missing[:1]] == ["random_states_0.pkl"]
    assert "can run any code" in done.missing[0]
    stored, held = load_group(done.checkpoint, "model"), load_group(done.checkpoint, "optimizer")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter)
        assert torch.equal(held[f"first_moment.{name}"], optimizer.state[parameter]["exp_avg"])
    state = json.loads((done.checkpoint / "state.json").read_text())["train"]
    assert (state["step"], state["epoch"], state["batch_index"]) == (5, 1, 1)  # of 4 steps in an epoch
    assert (state["loss_steps"], state["loss_history"]) == ([2, 5], [3.0, 2.5])
    assert [row["began_anew"] for row in read_events(run.events_path) if row["event"] == "imported"] == [done.missing]
    assert train(home, run, "--resume", done.checkpoint.name) == 0


def test_weights_of_a_bin_file_with_the_names_of_a_wrapped_model(home, foreign):
    model, _, folder = foreign
    tensors = {f"module.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    tensors["module.model.layers.0.attention.masked_bias"] = torch.tensor(-1e9)  # computed nowadays
    torch.save(tensors, folder / "pytorch_model.bin")
    done = import_accelerate(home, new_run(home), folder, root=home.path.parent)
    assert torch.equal(load_group(done.checkpoint, "model")["model.norm.weight"], model.model.norm.weight)


def test_without_its_optimizer_the_moments_begin_at_zero_and_that_is_said(home, foreign):
    _, _, folder = foreign
    (folder / "optimizer.bin").unlink()
    (folder / "metadata.json").unlink()
    done = import_accelerate(home, new_run(home), folder, root=home.path.parent)
    assert done.step == 5  # of its name
    assert "metadata.json (not there): the loss history begins anew" in done.missing
    assert "optimizer.bin (not there): the moments begin at zero" in done.missing
    assert not [n for n in load_group(done.checkpoint, "optimizer") if n.startswith("first_moment")]


def test_moments_in_an_unknown_order_are_not_taken(home, foreign):
    model, _, folder = foreign
    other = torch.optim.AdamW([{"params": [p]} for p in reversed(list(model.parameters()))], lr=1.0)
    other.step()
    torch.save(other.state_dict(), folder / "optimizer.bin")
    done = import_accelerate(home, new_run(home), folder, root=home.path.parent)
    assert any("optimizer.bin (it does not fit" in line for line in done.missing)


def test_a_pickle_that_would_run_code_is_not_run(home, foreign, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    _, _, folder = foreign
    for name in ("optimizer.bin", "random_states_0.pkl"):
        torch.save({"state": Trap()}, folder / name)
    done = import_accelerate(home, new_run(home), folder, root=home.path.parent)
    assert sum("can run any code" in line for line in done.missing) == 2
    (folder / "model.safetensors").unlink()
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(Damaged, match="cannot be read as plain tensors"):
        import_accelerate(home, new_run(home), folder, root=home.path.parent)
    assert not (tmp_path / "sprung").exists()


def test_other_weights_are_refused_by_name(home, foreign):
    _, _, folder = foreign
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors | {"strange": torch.zeros(1)}, folder / "model.safetensors")
    run = new_run(home)
    with pytest.raises(StateMismatch, match=r"missing: model\.norm\.weight; 1 unexpected: strange"):
        import_accelerate(home, run, folder, root=home.path.parent)
    assert checkpoints.ls(run) == []


def test_what_has_no_weights_or_no_step_or_too_many_is_refused(home, foreign, tmp_path):
    _, _, folder = foreign
    (tmp_path / "empty").mkdir()
    for source, error, words in (
        (tmp_path / "empty", NotFound, "neither model.safetensors nor pytorch_model.bin"),
        (tmp_path / "nowhere", NotFound, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            import_accelerate(home, new_run(home), source, root=home.path.parent)
    (folder / "metadata.json").write_text("{}")
    with pytest.raises(StateMismatch, match="does not say how many steps"):
        import_accelerate(home, new_run(home), folder.rename(tmp_path / "point"), root=home.path.parent)
    (tmp_path / "point" / "metadata.json").write_text('{"step": 400}')
    with pytest.raises(StateMismatch, match="has done 400 steps, and the recipe ends after 16"):
        import_accelerate(home, new_run(home), tmp_path / "point", root=home.path.parent)


def test_a_run_with_checkpoints_takes_none(home, trained, foreign):
    with pytest.raises(Conflict, match="has checkpoints of its own"):
        import_accelerate(home, trained, foreign[2], root=home.path.parent)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "point/../../escaped", "link"])
def test_an_archive_that_reaches_outside_is_refused(home, tmp_path, name):
    path = tmp_path / "point.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"point/{name}" if name == "link" else name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
        else:
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    run = new_run(home)
    with pytest.raises(Damaged, match=r"outside its folder|a link or a device"):
        import_accelerate(home, run, path, root=home.path.parent)
    assert not list(run.path.glob("import-*"))


def test_plain_safetensors_loads_the_weights(exported):
    model = build_model("tiny-qwen3", vocab_size_of(exported), seed=1)
    assert load_model(model, exported / "model.safetensors") == (set(), [])


def test_the_commands_export_and_import(home, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home.path))
    monkeypatch.chdir(home.path.parent)
    point = checkpoints.ls(trained)[0]
    folder = tmp_path / point.name
    arguments = ["checkpoints", "export", f"{trained.id}/{point.name}", str(folder), "--layout", "accelerate"]
    assert nightschool(arguments) == 0
    assert (folder / "optimizer.bin").is_file()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.recipe_path.read_text())
    capsys.readouterr()
    assert nightschool(["checkpoints", "import", str(folder), str(recipe), "train.epochs=5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["name"]) == (point.step, point.name)
    assert len(told["began_anew"]) == 1
    assert checkpoints.get(RunStore(home).get(told["run_id"]), point.name)
    runs = len(RunStore(home).ls())
    assert nightschool(["checkpoints", "import", str(tmp_path / "nowhere"), str(recipe)]) == 4
    assert len(RunStore(home).ls()) == runs
