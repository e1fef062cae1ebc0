"""What every configuration is held to: names, lists, the kinds of values, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.configuration import (
    ConfigError,
    Section,
    check_case_name,
    check_name,
    merge,
    no_repeats,
    read_yaml,
    tell_apart,
    validated,
    workflow_config,
)
from flowtilt.pipeline.experiment import load_file, load_resolved
from flowtilt.pipeline.sections import LEVEL, check_methods
from flowtilt.pipeline.theory.config import load_theory
from flowtilt.yaml_files import dump_yaml
from small import CONFIG, in_plane

EXPERIMENTS = CONFIG / "experiments"


def changed(tmp_path: Path, name: str, change: dict[str, Any], kind: str = "experiments") -> Path:
    """A shipped file with some keys changed, in a folder like the shipped one."""
    for folder in ("experiments", "theory", "models"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in (CONFIG / folder).glob("*.yaml"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    file = tmp_path / kind / f"{name}.yaml"
    file.write_text(dump_yaml(merge(read_yaml(file), change)))
    return file


GOOD_NAMES = ["am", "tfft_0.8_fitted", "stripes-0.05", "fdc_k5", "_own", "A.b-c_1", "7", "x" * 80]
BAD_NAMES = [
    *(
        "my method",
        "am (5)",
        "..",
        ".",
        "../x",
        "a/b",
        ";touch X",
        "-out",
        ".hidden",
        "",
        "a\n",
        "ü",
        "a" * 81,
    ),
    *("$(x)", "a'b", 'a"b', "a{b}", "a*", "a:b", "a\\b", "~", "a\x00"),
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_that_paths_commands_and_rules_can_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_they_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match=r"1 to 80 letters .* must not begin with \. or -; choose another"):
        check_name(name)


@pytest.mark.parametrize("name", ["a/", "/a", "a/b/c", "a/..", "../a"])
def test_a_case_has_the_names_of_its_study_and_its_own(name: str) -> None:
    assert check_case_name("resolution_2d/stripes-0.05") == "resolution_2d/stripes-0.05"
    with pytest.raises(ValueError, match="choose another"):
        check_case_name(name)


AM: dict[str, Any] = {"kind": "am"}


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        ("risk_averse_2d", {"methods": {"my method": AM}}, "methods.my method"),
        ("risk_averse_2d", {"methods": {"..": AM}}, "methods..."),
        ("risk_averse_2d", {"starts_from": "../x"}, "starts_from"),
        ("ot_2d", {"methods": {"am (5)": AM}}, "methods.am (5)"),
        (
            "ot_2d",
            {"evaluation": {"transport": {"metrics": {"a b": [1, 1]}}}},
            "evaluation.transport.metrics.a b",
        ),
        ("molecules_qm9", {"methods": {";touch X": AM}}, "methods.;touch X"),
        ("molecules_qm9", {"model": {"name": "../weights"}}, "model.name"),
        ("text_to_image_entropy", {"methods": {"$(x)": AM}}, "methods.$(x)"),
        ("text_to_image_entropy", {"model": "../models/bridges"}, "model"),
        ("resolution_2d", {"study": {"methods": {"a b": AM}}}, "study.methods.a b"),
        (
            "resolution_2d",
            {"study": {"cases": [{"label": "..", "of": "risk_averse_2d"}]}},
            "study.cases.0.label",
        ),
        ("resolution_2d", {"study": {"cases": [{"label": "a", "of": "../x"}]}}, "study.cases.0.of"),
    ],
)
def test_names_are_checked_when_a_file_is_read(
    file: str, change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, file, change)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert f"{path}" in str(caught.value)
    assert f"key {key}: a name must be 1 to 80 letters" in str(caught.value)


OLD_KEYS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("base", "starts_from", "risk_averse_2d", {"base": "novelty_2d"}),
    ("objective.level", LEVEL, "risk_averse_2d", {"objective": {"level": 0.01}}),
    ("objective.level", LEVEL, "molecules_qm9", {"objective": {"level": 0.998}}),
    ("methods.tfft.level", LEVEL, "molecules_qm9", {"methods": {"tfft": {"level": 0.9}}}),
    ("methods.tfft.rise", "narrowing", "molecules_qm9", {"methods": {"tfft": {"rise": 0.5}}}),
    ("evaluation.pictures", "images", "text_to_image_entropy", {"evaluation": {"pictures": 10}}),
    ("problems.gaussian.law", "distribution", "threshold", {"problems": {"gaussian": {"law": {}}}}),
]


def test_a_key_of_an_earlier_version_is_answered_with_its_new_name(tmp_path: Path) -> None:
    for key, new, file, change in OLD_KEYS:
        kind, load = ("theory", load_theory) if file == "threshold" else ("experiments", load_file)
        path = changed(tmp_path, file, change, kind)
        with pytest.raises(ConfigError) as caught:
            load(path)  # type: ignore[operator]
        assert f"{path}: key {key}: has been renamed to {new}" in str(caught.value)
    # Domains are imported as their files are read.
    assert {key.rpartition(".")[2] for key, *_ in OLD_KEYS} == {
        key for one in sections(Section) for key in one.renamed
    }


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    """A section and all that derive from it."""
    yield kind
    for own in kind.__subclasses__():
        yield from sections(own)


def test_names_of_files_are_checked_when_they_are_read(tmp_path: Path) -> None:
    for source in (EXPERIMENTS / "risk_averse_2d.yaml", EXPERIMENTS / "resolution_2d.yaml"):
        file = tmp_path / "my file.yaml"
        file.write_text(dump_yaml(read_yaml(source) | {"name": "my file"}))
        with pytest.raises(ConfigError, match="key name: a name must be"):
            load_file(file)
    file.write_text(dump_yaml(read_yaml(CONFIG / "theory" / "threshold.yaml") | {"name": "my file"}))
    with pytest.raises(ConfigError, match="key name: a name must be"):
        load_theory(file)


@pytest.mark.parametrize(
    ("file", "methods", "said"),
    [
        (
            "risk_averse_2d",
            {"pretrained": AM},
            "methods.pretrained: the name is that of the pretrained model",
        ),
        ("ot_2d", {"base": {"kind": "pretrained"}}, "methods.base: the pretrained model goes by the name"),
        ("molecules_qm9", {"pretrained": AM}, "methods.pretrained: the name is that of"),
        ("molecules_qm9", {"base": {"kind": "pretrained"}}, "methods.base: the pretrained model goes by"),
        ("text_to_image_entropy", {"pretrained": AM}, "methods.pretrained: the name is that of"),
        (
            "text_to_image_entropy",
            {"base": {"kind": "pretrained"}},
            "methods.base: the pretrained model goes",
        ),
        ("risk_averse_2d", {"am_exact": AM}, "methods.am_exact: the name is taken by a row of the method am"),
        ("risk_averse_2d", {"resolved": AM}, "methods.resolved: the name is taken by the rows"),
        ("risk_averse_2d", {"AM": AM}, "'am' and 'AM' are one file to some systems"),
        ("molecules_qm9", {"AM": AM}, "'am' and 'AM' are one file to some systems"),
    ],
)
def test_methods_whose_names_stand_for_something_else_are_refused(
    file: str, methods: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_file(changed(tmp_path, file, {"methods": methods}))
    assert said in str(caught.value)


def test_a_name_with_a_layer_at_its_end_may_stand_alone() -> None:
    check_methods(
        {"fit_exact": SimpleNamespace(kind="am"), "am": SimpleNamespace(kind="am")}, ("network", "exact")
    )


@pytest.mark.parametrize(
    ("file", "change", "key", "said"),
    [
        ("risk_averse_2d", {"seeds": [0, 0]}, "seeds", "0 occurs twice; keep one"),
        ("molecules_qm9", {"seeds": [3, 1, 3]}, "seeds", "3 occurs twice"),
        ("text_to_image_entropy", {"seeds": [0, 0]}, "seeds", "0 occurs twice"),
        ("resolution_2d", {"seeds": [0, 0]}, "seeds", "0 occurs twice"),
        ("text_to_image_entropy", {"prompts": ["a", "b", "a"]}, "prompts", "'a' occurs twice"),
        (
            "text_to_image_entropy",
            {"evaluation": {"designs": ["a", "a"]}},
            "evaluation.designs",
            "'a' occurs",
        ),
        (
            "resolution_2d",
            {
                "study": {
                    "cases": [{"label": "a", "of": "risk_averse_2d"}, {"label": "A", "of": "risk_averse_2d"}]
                }
            },
            "study.cases",
            "'a' and 'A' are one file to some systems",
        ),
        (
            "resolution_2d",
            {
                "study": {
                    "cases": [{"label": "a", "of": "risk_averse_2d"}, {"label": "a", "of": "novelty_2d"}]
                }
            },
            "study.cases",
            "'a' occurs twice",
        ),
    ],
)
def test_lists_that_say_a_thing_twice_are_refused(
    file: str, change: dict[str, Any], key: str, said: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, file, change)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert f"key {key}: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("skip", [{"methods": ["am", "am"]}, {"cases": ["stripes-0.05", "stripes-0.05"]}])
def test_what_is_skipped_is_named_once(skip: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="occurs twice"):
        load_file(EXPERIMENTS / "resolution_2d.yaml", {"skip": {"resolution_2d": skip}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shift": {"deltas": [0.1, 0.1]}}, "key shift.deltas: 0.1 occurs twice"),
        ({"shift": {"deltas": [1, 1.0]}}, "key shift.deltas: 1.0 occurs twice"),
        ({"problems": {"one distribution": {}}}, "key problems.one distribution"),
    ],
)
def test_studies_of_the_theory_are_held_to_the_same(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_theory(CONFIG / "theory" / "threshold.yaml", change)


@pytest.mark.parametrize(
    ("words", "sides"), [(["left", "right"], ("lower", "upper")), (["upper"], ("upper",))]
)
def test_tails_go_by_both_pairs_of_words(words: list[str], sides: tuple[str, ...], tmp_path: Path) -> None:
    name = next(iter(read_yaml(CONFIG / "theory" / "threshold.yaml")["problems"]))
    study = load_theory(CONFIG / "theory" / "threshold.yaml", {"problems": {name: {"tails": words}}})
    assert study.problems[name].tails == sides  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=f"key problems.{name}.tails: 'lower' occurs twice"):
        load_theory(CONFIG / "theory" / "threshold.yaml", {"problems": {name: {"tails": ["left", "lower"]}}})
    for word in words:
        file = changed(tmp_path, "risk_averse_2d", {"objective": {"tail": word}})
        assert load_file(file)["risk_averse_2d"].objective.tail == sides[words.index(word)]  # type: ignore[union-attr]


def test_another_word_for_a_tail_is_refused(tmp_path: Path) -> None:
    file = changed(tmp_path, "risk_averse_2d", {"objective": {"tail": "bottom"}})
    with pytest.raises(
        ConfigError, match=r"objective\.tail: a tail must be lower \(or left\) or upper \(or right\)"
    ):
        load_file(file)


@pytest.mark.parametrize("domain", ["mols", "Molecules", "plane", "", None, ["molecules"], 3])
def test_an_unknown_domain_is_refused_wherever_it_is_read(domain: Any, tmp_path: Path) -> None:
    for name in ("risk_averse_2d", "molecules_qm9"):
        file = changed(tmp_path, name, {"domain": domain})
        for load in (load_file, load_resolved):
            with pytest.raises(ConfigError) as caught:
                load(file)  # type: ignore[operator]
            unknown = f"unknown domain {domain!r}; known here: images, molecules, planar"
            said = unknown if isinstance(domain, str) else "must be images or molecules or planar, got"
            assert str(caught.value).startswith(f"{file}: key domain: {said}")


def test_an_experiment_without_a_domain_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    file = changed(tmp_path, "risk_averse_2d", {})
    data = read_yaml(file)
    del data["domain"]
    file.write_text(dump_yaml(data))
    for load in (load_file, load_resolved):
        with pytest.raises(ConfigError) as caught:
            load(file)  # type: ignore[operator]
        assert str(caught.value) == f"{file}: key domain: missing; add one: images or molecules or planar"


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("seeds: 3\ntitle: a\nseeds: 2\n", "key seeds: stands in line 1 and again in line 3"),
        ("methods:\n  am: {}\n  am: {}\n", "key methods.am: stands in line 2 and again in line 3"),
        ("gpu: 010\n", "key gpu: 010 in line 1"),
    ],
)
def test_every_reader_refuses_what_says_two_things(text: str, change: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    settings = SimpleNamespace(configfiles=[], config_args=None, replace_workflow_config=False)
    readers = (
        load_file,
        load_resolved,
        load_theory,
        read_yaml,
        lambda path: workflow_config([path], settings, {}),
    )
    for read in readers:
        with pytest.raises(ConfigError) as caught:
            read(file)  # type: ignore[operator]
        assert str(caught.value).startswith(f"{file}: {change}")
    model = changed(tmp_path, "text_to_image_entropy", {}).parents[1] / "models" / "bridges.yaml"
    model.write_text(model.read_text() + "\npipeline: {}\n")
    with pytest.raises(ConfigError, match=r"bridges\.yaml: key pipeline: stands in line"):
        load_file(tmp_path / "experiments" / "text_to_image_entropy.yaml")


def test_a_json_mapping_with_a_key_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(EXPERIMENTS / "risk_averse_2d.yaml")
    with pytest.raises(SystemExit):
        main(["resolve", file, "--override", '{"seeds": 1, "seeds": 2}', "--output", "x.yaml"])
    assert "'key seeds' occurs twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"objective": {"mass": "8e-1"}}, "objective.mass", "must be a number, and text was given"),
        ({"solver": {"updates": True}}, "solver.updates", "must be a number, and true or false was given"),
        ({"solver": {"learning_rate": True}}, "solver.learning_rate", "must be a number"),
        ({"solver": {"updates": "10"}}, "solver.updates", "must be a number, and text was given"),
        ({"seeds": True}, "seeds", "list"),
        ({"seeds": [False, True]}, "seeds", "must be a number, and true or false"),
        ({"network": {"widths": ["64", 64]}}, "network.widths", "must be a number, and text was given"),
        ({"objective": {"alpha": float("inf")}}, "objective.alpha", "finite"),
        ({"objective": {"alpha": float("nan")}}, "objective.alpha", "finite"),
        ({"data": {"means": [["1:30", 0], [0, 0]]}}, "data.means.0.0", "number"),
        ({"solver": {"updates": "1_000"}}, "solver.updates", "must be a number, and text was given"),
    ],
)
def test_values_keep_their_kind(change: dict[str, Any], key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_file(changed(tmp_path, "risk_averse_2d", change))
    assert f"key {key}: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["yes", "on", 1, "true"])
def test_a_switch_is_true_or_false(value: Any, tmp_path: Path) -> None:
    file = changed(tmp_path, "text_to_image_entropy", {"retrain": value})
    with pytest.raises(
        ConfigError, match=r"key retrain: must be true or false, and (text|a number) was given"
    ):
        load_file(file)


def test_whole_numbers_may_be_written_with_a_power_of_ten(tmp_path: Path) -> None:
    file = changed(tmp_path, "risk_averse_2d", {})
    file.write_text(file.read_text().replace("updates: 400", "updates: 4e2"))
    loaded = load_file(file, in_plane(solver={"updates": 1e3}))["risk_averse_2d"]
    assert loaded.solver.updates == 1000
    assert type(loaded.solver.updates) is int


def settings(given: list[Path], *config: str, replaced: bool = False) -> SimpleNamespace:
    """What Snakemake's own settings say of the command line."""
    return SimpleNamespace(
        configfiles=given, config_args=list(config) or None, replace_workflow_config=replaced
    )


def test_the_configuration_is_merged_as_snakemake_merges_it(tmp_path: Path) -> None:
    own, one, two = (tmp_path / f"{name}.yaml" for name in ("config", "one", "two"))
    own.write_text("results: res\ngpu: 1\noverrides: {seeds: 5, solver: {pool: 8}}\n")
    one.write_text("overrides: {seeds: 3, objective: {mass: 8e-1}}\n")
    two.write_text("overrides: {seeds: 2}\n")
    files = [one, two, own]  # as in workflow.configfiles
    expected = {"seeds": 2, "solver": {"pool": 8}, "objective": {"mass": 0.8}}
    assert workflow_config(files, settings([one, two]), {}) == {
        "results": "res",
        "gpu": 1,
        "overrides": expected,
    }
    assert workflow_config(files, settings([one, two], replaced=True), {}) == {
        "overrides": {"seeds": 2, "objective": {"mass": 0.8}}
    }
    last = settings([one, two], "overrides={seeds: 1, objective: {mass: 7e-1}}", "results='010'", "theory=[]")
    assert workflow_config(files, last, {}) == {
        "results": "010",
        "gpu": 1,
        "theory": [],
        "overrides": {"seeds": 1, "solver": {"pool": 8}, "objective": {"mass": 0.7}},
    }


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("overrides={seeds: 1, seeds: 2}", "--config overrides: key seeds: stands in line 1 and again"),
        ("gpu=010", "--config gpu: 010 in line 1"),
        ("overrides={seeds: [1}", "--config overrides: not valid YAML"),
        ("experiments=[a, b, a]", "key experiments: 'a' occurs twice"),
        ("experiments=[a, A]", "key experiments: 'a' and 'A' are one file"),
        ("theory=[a b]", "key theory.0: a name must be"),
    ],
)
def test_what_the_command_line_says_is_held_to_the_same(entry: str, said: str, tmp_path: Path) -> None:
    own = tmp_path / "config.yaml"
    own.write_text("experiments: [a]\n")

    def read() -> None:
        data = workflow_config([own], settings([], entry), {})
        validated(WorkflowConfig, {"results": "r", "resolution": "a", **data}, own)

    with pytest.raises(ConfigError) as caught:
        read()
    assert said in str(caught.value)


def test_a_snakemake_that_does_not_tell_how_files_were_given(tmp_path: Path) -> None:
    own = tmp_path / "config.yaml"
    own.write_text("gpu: 1\n")
    assert workflow_config([own], None, {"gpu": 2}) == {"gpu": 2}
    own.write_text("gpu: 1\ngpu: 1\n")
    with pytest.raises(ConfigError, match="stands in line 1 and again"):
        workflow_config([own], None, {"gpu": 1})


def test_lists_and_names_are_returned_as_they_are() -> None:
    assert no_repeats([1, "1", 2]) == [1, "1", 2]
    assert tell_apart({"a": 1, "b": 2}) == {"a": 1, "b": 2}
