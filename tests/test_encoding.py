"""Text is UTF-8, whatever the locale."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowtilt.files import read_text, write_text
from flowtilt.pipeline.configuration import ConfigError, read_yaml
from small_images import CONFIG

ROOT = Path(__file__).parents[1]
PYTHON = [file for folder in ("src", "workflow", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
"""Variables under which Python takes text for ASCII."""

TEXT_METHODS = ("open", "read_text", "write_text", "FileHandler", "TextIOWrapper", "NamedTemporaryFile")


def in_ascii(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **ASCII, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONIOENCODING", None)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)


def experiment_with(title: str, folder: Path) -> Path:
    data = yaml.safe_load((CONFIG / "experiments" / "risk_averse_2d.yaml").read_text(encoding="utf-8"))
    file = folder / "risk_averse_2d.yaml"
    file.write_text(yaml.safe_dump({**data, "title": title}, allow_unicode=True), encoding="utf-8")
    return file


def test_a_stage_reads_writes_and_logs_utf8_in_any_locale(tmp_path: Path) -> None:
    file, output = experiment_with("Für π", tmp_path), tmp_path / "out.yaml"
    code = "import locale; assert locale.getpreferredencoding(False) in ('ANSI_X3.4-1968', 'US-ASCII')"
    assert in_ascii("-c", code).returncode == 0
    command = ("-c", "import sys; from flowtilt.pipeline.cli import run; sys.exit(run())")
    done = in_ascii(*command, "resolve", str(file), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(output.read_bytes())["title"] == "Für π"
    file.write_text("title: [Für π\n", encoding="utf-8")
    done = in_ascii(*command, "resolve", str(file), "--name", "é", "--output", str(output))
    assert done.returncode == 1
    assert b"not valid YAML" in done.stderr
    file = experiment_with("Für π", tmp_path)
    change = json.dumps({"Größe": 3}, ensure_ascii=True)
    done = in_ascii(*command, "resolve", str(file), "--override", change, "--output", str(output))
    assert "Größe" in done.stderr.decode("utf-8")


def test_text_is_written_and_read_in_any_locale(tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    code = (
        "import sys; from pathlib import Path; from flowtilt.files import read_json, write_text\n"
        f"write_text(Path({str(file)!r}), '\"f\\u00fcr\"')\n"
        f"assert read_json(Path({str(file)!r})) == 'f\\u00fcr'"
    )
    done = in_ascii("-c", code)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == '"für"'.encode()


@pytest.mark.parametrize(
    ("content", "line"),
    [("a: 1\nb: für\n".encode("iso-8859-1"), 2), ("a: 1\n".encode("utf-16"), 1), (b"\n\n\xef\xbb", 3)],
)
def test_other_encodings_are_refused_with_file_and_line(content: bytes, line: int, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"e\.yaml, line {line}: .*not UTF-8.*save"):
        read_yaml(file)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_bytes("\ufeffname: für\n".encode())
    assert read_yaml(file) == {"name": "für"}
    write_text(file, "\ufeffü")
    assert read_text(file) == "ü"


def bare(tree: ast.AST) -> list[int]:
    """Lines of calls that take text in the locale's encoding."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keys = {keyword.arg for keyword in call.keywords}
        words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = any(set(word) <= set("rwxab+") and "b" in word for word in words)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        method = isinstance(call.func, ast.Attribute) or name == "open"
        image = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "Image"
        text = method and name in TEXT_METHODS and not binary and not image
        if (text or keys & {"text", "universal_newlines"}) and "encoding" not in keys:
            lines.append(call.lineno)
    return lines


def test_the_check_for_bare_text_finds_it() -> None:
    found = bare(
        ast.parse(
            "p.read_text()\np.write_text('x')\nopen('x')\np.open(newline='')\nrun(c, text=True)\n"
            "logging.FileHandler(f)\np.open('rb')\nImage.open(p)\np.read_text(encoding='utf-8')\nread_text(p)\n"
        )
    )
    assert found == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_leaves_the_encoding_to_the_locale(file: Path) -> None:
    assert bare(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "file", [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
)
def test_no_rule_leaves_the_encoding_to_the_locale(file: Path) -> None:
    calls = re.findall(r"\.(?:open|read_text|write_text)\([^)]*\)", file.read_text(encoding="utf-8"))
    assert [call for call in calls if "encoding=" not in call] == []
