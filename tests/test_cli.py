"""The command line as a person meets it: what is printed, where it goes, how it ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from typer.testing import CliRunner

from attnzoo.cli.app import app

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner()


def run(*arguments: str, code: int = 0):
    """A verb in this process; its exit code is checked."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result


def spawn(*arguments: str, **options) -> subprocess.CompletedProcess:
    """A verb in a process of its own."""
    return processes.run("-m", "attnzoo", *arguments, cwd=ROOT, **options)


def test_compose_shows_the_model():
    out = run("compose", str(ROOT / "recipes" / "ham_a.yaml")).output
    for text in ("121 786 parameters", "4 sites", "└ softmax", "└ soft", "hadamard", "8 × 8 + 1 tokens", "10 classes",
                 "1 × 10 in", "all 66 parameter tensors received a finite one", "next:", "timm.create_model('ham_vit_a')",
                 "starts equal to vit_base_patch16_224: no", "+2.3 %"):  # fmt: skip
        assert text in out, text


def test_compose_as_json():
    data = json.loads(run("compose", "ham_b_tiny", "--json").stdout)
    assert (
        data["starts_equal"]
        and data["sites"] == 12
        and data["new_tensors"] == 48
        and not data["lost_tensors"]
    )
    assert data["run"]["shape"] == [1, 1000] and data["run"]["without_gradient"] == []
    assert [row["what"] for row in data["rows"]] == ["add start=identity", "softmax", "soft"]
    assert (
        data["flops"] > data["base_flops"] == pytest.approx(2.507e9, rel=0.002)
    )  # ViT-Ti, two per multiply-add


def test_compose_with_edits_and_a_image(tmp_path):
    from PIL import Image

    image = tmp_path / "grey.png"
    Image.new("L", (50, 70), 128).save(image)
    out = run("compose", "ham_a", "--set", "attention.of.1.with.variant=gated", "--image", str(image)).output
    assert "variant=gated" in out and "grey.png" in out


def test_compose_out_is_what_timm_loads(tmp_path):
    import timm

    import attnzoo  # noqa: F401

    out = run("compose", "ham_a", "--set", "host.model.depth=2", "--out", str(tmp_path / "m")).output
    assert "model.safetensors" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert len(model.blocks) == 2 and (tmp_path / "m" / "model.safetensors").exists()
    again = run("compose", "ham_a", "--out", str(tmp_path / "m"), code=2)
    assert "AZ607" in again.output and "already holds" in again.output


def test_compose_init_from(tmp_path):
    import timm
    from safetensors.torch import save_file

    plain = timm.create_model("vit_tiny_patch16_224")
    save_file(plain.state_dict(), tmp_path / "vit.safetensors")
    out = run(
        "compose",
        "ham_b_tiny",
        "--init-from",
        str(tmp_path / "vit.safetensors"),
        "--out",
        str(tmp_path / "m"),
    ).output
    assert "152 tensors copied" in out and "48 new" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), plain.eval()(x))
    wrong = run("compose", "ham_b_small", "--init-from", str(tmp_path / "vit.safetensors"), code=2).output
    assert "AZ606" in wrong and "do not fit" in wrong
    (tmp_path / "evil.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    assert "AZ606" in run("compose", "ham_b_tiny", "--init-from", str(tmp_path / "evil.pth"), code=2).output


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["compose", "hama"], 2, ["AZ204", "did you mean"]),
        (["compose", "nothing/here.yaml"], 2, ["AZ101", "no such file"]),
        (["compose", "ham_a", "--set", "attention"], 2, ["AZ117"]),
        (["compose", "ham_a", "--set", "attention.fuse=hadamrd"], 2, ["AZ201", "did you mean `hadamard`"]),
        (["compose", "ham_a", "--image", "README.md"], 2, ["AZ604", "no image"]),
        (["compose", "ham_a", "--image", "none.png"], 2, ["AZ604", "no such file"]),
        (["compose", "third_party"], 2, ["wavelets"]),
        (["show", "sofmax"], 2, ["AZ201", "did you mean `softmax`"]),
        (["list", "--family", "liner"], 2, ["AZ605", "did you mean `linear`"]),
        (["list", "--law", "stochastc"], 2, ["AZ605", "stochastic"]),
        (["check", "softmx"], 2, ["AZ201", "softmax"]),
        (["check"], 2, ["AZ502"]),
        (["check", "--plugin", "nobody"], 2, ["AZ502"]),
        (["check", "no_such_file.py"], 2, ["AZ50"]),
        (["bench", "ham_vit_a", "--against", "vit_tiny_patch16_224"], 2, ["AZ610", "224"]),
        (["bench", "ham_vit_x", "--against", "ham_vit_a"], 2, ["AZ204", "did you mean"]),
        (["bench", "ham_vit_a", "--against", "ham_vit_b", "--device", "nonsense"], 2, ["AZ609"]),
        (["run", "nothing.py"], 2, ["AZ608"]),
        (["run", "no_such_module_at_all"], 2, ["AZ608"]),
    ],
)
def test_faults_are_explained(arguments, code, texts, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run(*arguments, code=code)
    for text in texts:
        assert text in result.output, result.output
    assert "Traceback" not in result.output


def test_faults_as_json(tmp_path):
    (tmp_path / "bad.yaml").write_text("recipe: 1\nhost: {kind: vit, model: {depht: 2}}\nattention: softmx\n")
    data = json.loads(run("compose", str(tmp_path / "bad.yaml"), "--json", code=2).stdout)
    places = [(error["code"], error["place"]["line"], error["place"]["column"]) for error in data["errors"]]
    assert places == [("AZ110", 2, 27), ("AZ201", 3, 12)]


def test_markup_and_escapes_are_harmless(tmp_path):
    (tmp_path / "bad.yaml").write_text('recipe: 1\nhost: {kind: vit}\nattention: "[bold]x[/bold]\\e[2J"\n')
    result = spawn("compose", str(tmp_path / "bad.yaml"))
    assert result.returncode == 2 and "\x1b" not in result.stderr and "[bold]" in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_list_and_show_everything():
    data = json.loads(run("list", "--json").stdout)
    assert {"softmax", "soft", "fourier"} <= {row["name"] for row in data["mechanisms"]}
    assert {"hadamard", "add"} <= {row["name"] for row in data["fusions"]}
    causal = json.loads(run("list", "mechanisms", "--mask", "causal", "--json").stdout)["mechanisms"]
    assert "softmax" in {row["name"] for row in causal} and "fourier" not in {row["name"] for row in causal}
    linear = json.loads(run("list", "--family", "linear", "--json").stdout)["mechanisms"]
    assert {"agent", "elu_linear", "linformer"} <= {row["name"] for row in linear}
    assert {row["family"] for row in linear} == {"linear"}
    models = json.loads(run("list", "models", "--json").stdout)["models"]
    assert "ham_vit_b" in {row["name"] for row in models}
    for kind in ("mechanisms", "fusions", "probes", "interventions", "recipes"):
        for row in data[kind][::5]:
            assert row["name"] in run("show", row["name"]).output
            assert json.loads(run("show", row["name"], "--json").stdout)["name"] == row["name"]


@pytest.mark.slow  # some three hundred
def test_show_everything():
    for rows in json.loads(run("list", "--json").stdout).values():
        for row in rows:
            assert row["name"] in run("show", row["name"]).output


def test_check_passes_and_fails(tmp_path):
    assert "0" in run("check", "fourier", "--examples", "3").output
    broken = (
        (ROOT / "attnzoo" / "mechanisms" / "mixing" / "fourier.py")
        .read_text()
        .replace(".real.to(", ".real.flip(0).to(")  # samples for each other's
    )
    (tmp_path / "mine.py").write_text(broken.replace('name="fourier"', 'name="mine"'))
    result = run("check", str(tmp_path / "mine.py"), "--examples", "5", code=1)
    assert "check_batch_independent" in result.output
    results = json.loads(run("check", str(tmp_path / "mine.py"), "--examples", "5", "--json", code=1).stdout)
    assert {"passed", "failed"} <= {row["status"] for row in results}


def test_schema_accepts_shipped_recipes():
    import jsonschema
    import yaml

    schema = json.loads(run("schema").stdout)
    validator = jsonschema.Draft7Validator(schema)
    jsonschema.Draft7Validator.check_schema(schema)
    for path in (ROOT / "recipes").rglob("*.yaml"):
        if path.stem != "third_party":  # names what is not installed here
            assert not list(validator.iter_errors(yaml.safe_load(path.read_text()))), path
    for bad in ({"recipe": 1, "hots": 3}, {"recipe": 1, "attention": "softmx"}, {"recipe": 2},
                {"recipe": 1, "attention": {"use": "soft", "with": {"readin": "pooled"}}}):  # fmt: skip
        assert list(validator.iter_errors(bad)), bad


def test_plugins_and_doctor():
    assert "attnzoo" in run("plugins").output
    assert json.loads(run("plugins", "--json").stdout)[0]["name"] == "attnzoo"
    data = json.loads(run("doctor", "--json").stdout)
    assert data["ills"] == [] and data["versions"]["torch"] and data["models"] >= 9


def test_run_makes_models_known(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, timm\nprint(timm.is_model('ham_vit_b'), sys.argv[1:], __name__)\n")
    done = spawn("run", str(script), "--model", "ham_vit_b", "-x")
    assert done.stdout.strip() == "True ['--model', 'ham_vit_b', '-x'] __main__", done.stderr
    script.write_text("raise SystemExit(7)")
    assert spawn("run", str(script)).returncode == 7


def test_bench_prints_ratios():
    data = json.loads(
        run(
            "bench", "ham_vit_b", "--against", "ham_vit_classic", "--rounds", "3", "--batch", "4", "--json"
        ).stdout
    )
    names = [figure["what"] for figure in data["figures"]]
    assert names == ["eval", "memory in eval", "training step", "memory in training"]
    for figure in data["figures"]:
        assert figure["ratio"] == pytest.approx(figure["candidate"][0] / figure["baseline"][0])
    assert data["figures"][3]["ratio"] > 1  # a second branch keeps something for the backward pass
    assert "ratio" in run("bench", "ham_vit_b", "--against", "ham_a", "--rounds", "2", "--batch", "2").output


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["compse"], ["compose"], ["list", "--familly", "x"], ["--version"], ["new", "-h"]],
)
def test_help_and_usage_errors_are_light(arguments):
    """Neither torch nor timm is imported."""
    code = (
        f"import sys\nsys.argv = ['attnzoo', *{arguments!r}]\ntry:\n    from attnzoo.cli.app import main\n    main()\n"
        "except SystemExit:\n    pass\nprint('heavy:', sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_help_is_quick():
    """Generous here, because tests share the machine; docs/benchmarks.md has the figure."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "attnzoo", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 2.0


def test_usage_error_ends_with_2():
    done = spawn("compse")
    assert done.returncode == 2 and "Did you mean 'compose'" in done.stderr and "Traceback" not in done.stderr


def test_no_colour_when_piped():
    env = os.environ | {"NO_COLOR": "1"}
    assert "\x1b" not in spawn("show", "softmax", env=env).stdout


def test_interrupt_ends_with_130(monkeypatch):
    import attnzoo.zoo

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("attnzoo.zoo.load_zoo", interrupted)
    assert attnzoo.zoo.load_zoo is interrupted
    assert "interrupted" in run("list", code=130).output
