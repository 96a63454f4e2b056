"""The Kubernetes manifests: valid, and with the names, commands and settings of the other deployments."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.compose import COMPOSE
from tests.support.paths import ROOT
from worker.settings import Settings

FOLDER = ROOT / "worker" / "deploy" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
VERSIONS = ("1.29.1", "1.37.0")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


OBJECTS = {(one["kind"], one["metadata"]["name"]): one for path in MANIFESTS for one in documents(path)}


def pod(kind: str, name: str) -> dict[str, Any]:
    spec = OBJECTS[kind, name]["spec"]
    template = spec["jobTemplate"]["spec"]["template"] if kind == "CronJob" else spec["template"]
    return dict(template["spec"])


PODS = {name: pod(kind, name) for kind, name in OBJECTS if kind != "ConfigMap"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_is_valid_for_this_kubernetes(path: Path, version: str) -> None:
    for one in documents(path):
        kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_manifest_is_found() -> None:
    wrong = documents(FOLDER / "scorer.yaml")[0]
    wrong["spec"]["template"]["spec"]["containers"][0]["comand"] = ["tweetscore"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_commands_and_probes_are_those_of_docker_compose() -> None:
    assert PODS.keys() == {"migrate", "scorer", "trainer"}
    for name, spec in PODS.items():
        (container,) = spec["containers"]
        service = COMPOSE["services"][name]
        assert container["command"] == service["command"]
        # Not from the service: PyYAML merges several maps in another order than Compose.
        assert container["image"] == COMPOSE["x-tweetscore" if name == "migrate" else "x-gpu"]["image"]
        if name != "migrate":
            probe = service["healthcheck"]["test"][1:]  # without CMD
            assert (
                container["startupProbe"]["exec"]["command"] == container["livenessProbe"]["exec"]["command"] == probe
            )
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert spec["terminationGracePeriodSeconds"] > Settings.model_fields["grace_seconds"].default


def test_pods_run_as_the_user_of_the_image_and_write_to_their_volumes_alone() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for spec in PODS.values():
        assert spec["securityContext"]["runAsNonRoot"]
        assert f"\nUSER {spec['securityContext']['runAsUser']}\n" in image
        (container,) = spec["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"home": "/data", "tmp": "/tmp"}
        assert {volume["name"] for volume in spec["volumes"]} == mounted.keys()


def test_every_variable_is_a_setting() -> None:
    known = {f"TWEETSCORE_{name.upper()}" for name in Settings.model_fields}
    given = OBJECTS["ConfigMap", "tweetscore"]["data"]
    assert {name for name in given if name.startswith("TWEETSCORE_")} <= known
    # Not the volume itself, which belongs to root: a worker closes its home to others.
    assert Path(given["TWEETSCORE_HOME"]).parent == Path(given["HOME"]) == Path("/data")
    for name in ("TWEETSCORE_METRICS_PORT", "TWEETSCORE_METRICS_HOST"):
        assert given[name] == COMPOSE["x-tweetscore"]["environment"][name]


def test_keda_scales_the_scorers_by_the_lag_of_their_group() -> None:
    scaled = {one["kind"]: one for one in documents(FOLDER / "keda" / "scaler.yaml")}
    spec = scaled["ScaledObject"]["spec"]
    (trigger,) = spec["triggers"]
    assert ("Deployment", spec["scaleTargetRef"]["name"]) in OBJECTS
    assert trigger["type"] == "redis-streams"
    assert trigger["metadata"]["stream"] == Settings.model_fields["stream_key"].default
    assert trigger["metadata"]["consumerGroup"] == Settings.model_fields["group"].default
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA refuses numbers
    assert int(trigger["metadata"]["lagCount"]) > 0
    authentication = scaled["TriggerAuthentication"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
