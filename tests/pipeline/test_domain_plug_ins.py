"""Domains of other packages that cannot be used: one message each, which names the package and the cure."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import DomainError, domain_named, known_domains, sources
from flowtilt.pipeline.experiment import load_file

WHOLE = """
from flowtilt.pipeline.usual import BaseDomain

class Own(BaseDomain):
    name = "own"
    words = "on something"
    stages = ()
    workbench = process = "own_domain:nothing"
    def schema(self, data): ...

DOMAIN = Own()
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a package with a domain and its entry point, there until the test ends."""
    made = []

    def package(
        text: str, name: str = "own", package: str = "own-domain", module: str = "own_domain"
    ) -> None:
        folder = tmp_path / package
        data = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        data.mkdir(parents=True)
        (folder / f"{module}.py").write_text(text)
        (data / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (data / "entry_points.txt").write_text(f"[flowtilt.domains]\n{name} = {module}:DOMAIN\n")
        monkeypatch.syspath_prepend(str(folder))
        made.append(module)
        forget()

    yield package
    for module in made:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    forget()


def forget() -> None:
    sources.cache_clear()
    domain_named.cache_clear()


def refused(name: str) -> str:
    """What is said of a domain, on one line."""
    with pytest.raises(DomainError) as caught:
        domain_named(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_domain_of_another_package_is_found(install: Install) -> None:
    install(WHOLE)
    assert domain_named("own").environment == "core"
    assert "own" in [each.name for each in known_domains()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (r"raise ValueError('one\ntwo')", "ValueError: one two"),
        ("other = 1", "AttributeError: module 'own_domain' has no attribute 'DOMAIN'"),
    ],
)
def test_one_that_cannot_be_imported(install: Install, text: str, said: str) -> None:
    install(text)
    message = refused("own")
    assert message.startswith("domain 'own' (package own-domain), own_domain:DOMAIN: cannot be imported (")
    assert said in message
    assert message.endswith("mend its package, or uninstall it")


def test_one_that_lacks_a_method(install: Install) -> None:
    install(
        WHOLE.replace("    def schema(self, data): ...\n", "").replace('    words = "on something"\n', "")
    )
    message = refused("own")
    assert "(package own-domain), own_domain:DOMAIN: lacks words, schema, which" in message
    assert "add them, or install versions of both packages that fit" in message


@pytest.mark.parametrize("value", ["None", "{}", "print", "Own"])
def test_one_that_is_no_domain(install: Install, value: str) -> None:
    install(WHOLE.replace("DOMAIN = Own()", f"DOMAIN = {value}"))
    message = refused("own")
    assert "(package own-domain), own_domain:DOMAIN: is" in message
    assert "not a domain" in message


def test_one_that_calls_itself_otherwise(install: Install) -> None:
    install(WHOLE.replace('name = "own"', 'name = "other"'))
    assert "(package own-domain), own_domain:DOMAIN: calls itself 'other'; give both" in refused("own")


def test_two_packages_of_one_name(install: Install) -> None:
    install(WHOLE)
    install(WHOLE, package="second-domain", module="second_domain")
    message = refused("own")
    assert "two packages bring a domain 'own': " in message
    for one in ("own_domain:DOMAIN (package own-domain)", "second_domain:DOMAIN (package second-domain)"):
        assert one in message
    assert "uninstall one of them" in message


def test_a_package_with_the_name_of_a_domain_that_is_there(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(WHOLE.replace('"own"', '"planar"'), name="planar")
    with pytest.raises(DomainError, match=re.escape("own_domain:DOMAIN (package own-domain)")):
        known_domains()
    assert main(["finetune", "mine.yaml", "--results", "results"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "flowtilt: two packages bring a domain 'planar': flowtilt.domains.planar:DOMAIN and "
    )
    assert said.count("\n") == 1


def test_an_experiment_of_a_domain_that_is_not_installed(tmp_path: Path) -> None:
    forget()
    file = tmp_path / "elsewhere.yaml"
    file.write_text("name: elsewhere\ndomain: circle\n")
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    assert str(caught.value).startswith(f"{file}: key domain: unknown domain 'circle'; known here: images, ")
    assert "once the package that brings it is installed" in str(caught.value)


def test_one_that_fails_leaves_others_alone(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command; the domain is named as soon as an experiment asks for it."""
    install("1 / 0")
    assert "own" not in [each.name for each in known_domains()]
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndomain: own\n")
    assert main(["resolve", str(file), "--output", str(tmp_path / "resolved.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{file}: key domain: domain 'own' (package own-domain)" in said
