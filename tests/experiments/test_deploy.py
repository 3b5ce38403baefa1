"""Files that start several hosts: no cluster is at hand, so fields, numbers and options are checked."""

import functools
import math
import os
import pathlib
import shutil
import subprocess

import jsonschema
import pytest
import yaml

from dsv4_jax.command_line import main as command_line
from sharding.mesh import parse
from sharding.processes import option_problems

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "deploy"
SCRIPT = FOLDER / "tpu_vm.sh"


def fields(required=(), /, **properties):
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item):
    return {"type": "array", "items": item, "minItems": 1}


NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 1}
NATURAL = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}

# The part of the published JobSet, Job and Pod descriptions that such a manifest may use.
CONTAINER = fields(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    command=several({"type": "string"}),
    args=several({"type": "string"}),
    env=several(fields(("name",), name=TEXT, value={"type": "string"})),
    ports=several(
        fields(("containerPort",), containerPort={"type": "integer", "minimum": 1, "maximum": 65535})
    ),
    resources=fields(
        requests={"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
        limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
    ),
    volumeMounts=several(fields(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
POD = fields(
    ("containers", "restartPolicy"),
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=NATURAL,
    nodeSelector=TEXTS,
    containers=several(CONTAINER),
    volumes=several(
        fields(
            ("name",),
            name=NAME,
            persistentVolumeClaim=fields(("claimName",), claimName=TEXT, readOnly=FLAG),
        )
    ),
)
JOB = fields(
    ("template",),
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=NATURAL,
    template=fields(("spec",), metadata=fields(labels=TEXTS, annotations=TEXTS), spec=POD),
)
JOBSET = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields(("name",), name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS),
    spec=fields(
        ("replicatedJobs",),
        failurePolicy=fields(maxRestarts=NATURAL),
        network=fields(enableDNSHostnames=FLAG, subdomain=NAME, publishNotReadyAddresses=FLAG),
        ttlSecondsAfterFinished=NATURAL,
        suspend=FLAG,
        replicatedJobs=several(
            fields(("name", "template"), name=NAME, replicas=COUNT, template=fields(("spec",), spec=JOB))
        ),
    ),
)


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def test_the_manifest_has_published_fields_only(manifest):
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(manifest, JOBSET)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "kind", "Job"),
        (("spec",), "replicas", 2),
        (("spec", "replicatedJobs", 0, "template", "spec"), "backoffLimit", -1),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolicy", "Always"),
    ],
)
def test_the_schema_refuses(manifest, path, key, value):
    wrong = yaml.safe_load(yaml.safe_dump(manifest))
    functools.reduce(lambda node, step: node[step], path, wrong)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, JOBSET)


def test_the_numbers_of_the_slice_agree(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    own = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == own
    assert job["parallelism"] == job["completions"] == chips // own
    arguments = container["args"]
    assert math.prod(parse(arguments[arguments.index("--mesh") + 1]).values()) == chips
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts[arguments[1]] in {volume["name"] for volume in pod["volumes"]}


def given_to_generate(monkeypatch, arguments):
    calls = []

    @functools.wraps(command_line.generate)
    def generate(**given):
        calls.append(given)

    monkeypatch.setitem(command_line.SUBCOMMANDS, "generate", generate)
    assert command_line.run(arguments) == 0
    return calls[0]


def test_the_command_has_such_options(manifest, monkeypatch):
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["dsv4"]
    hosts = given_to_generate(monkeypatch, container["args"])["hosts"]
    assert hosts.coordinator == "auto"
    assert option_problems(hosts.coordinator, hosts.num_processes, hosts.process_id) == []


def run_script(folder, endings, *arguments):
    """The script with stand-ins: a gcloud that notes what it gets and ends so, and a sleep that does not."""
    (folder / "endings").write_text("".join(f"{code}\n" for code in endings))
    stand_in = f"""#!/bin/bash
printf '%s\\n' "$@" >> {folder}/called
code=$(head -n 1 {folder}/endings)
sed -i 1d {folder}/endings
exit "$code"
"""
    for name, text in {"gcloud": stand_in, "sleep": f'#!/bin/bash\necho "$@" >> {folder}/slept\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    line = [shutil.which("bash"), str(SCRIPT), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=30)


def test_the_script_starts_all_hosts_again(tmp_path):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=30)
    done = run_script(
        tmp_path, [134, 255, 0], "slice", "zone-b", "5", "dsv4", "generate", "a b", "import 'os'"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "tpu_vm.sh: start 1 of 5 ended with exit code 134",
        "tpu_vm.sh: start 2 of 5 ended with exit code 255",
    ]
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 3 * 8 and called[3:7] == ["ssh", "slice", "--zone=zone-b", "--worker=all"]
    command = called[7].removeprefix("--command=")
    said = subprocess.run(
        ["bash", "-c", f"printf '%s|' {command}"], capture_output=True, text=True, timeout=30
    )
    assert said.stdout == "dsv4|generate|a b|import 'os'|"
    assert (tmp_path / "slept").read_text().splitlines() == ["60", "60"]


def test_the_script_gives_up(tmp_path):
    done = run_script(tmp_path, [134, 3, 0], "slice", "zone-b", "2", "dsv4")
    assert done.returncode == 3 and (tmp_path / "slept").read_text() == "60\n"


@pytest.mark.parametrize(
    "arguments", [["slice", "zone", "0", "dsv4"], ["slice", "zone", "1"], ["slice", "z", "x", "y"]]
)
def test_the_script_refuses(tmp_path, arguments):
    done = run_script(tmp_path, [], *arguments)
    assert done.returncode == 2 and "usage" in done.stderr and not (tmp_path / "called").exists()
