"""``make results`` on a tiny benchmark: two studies of a few digits, run once from the command line's own function."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from pipeline.benchmark.choice import Choice
from pipeline.benchmark.comparison import CHOSEN, JUDGED_AGAINST, method_label
from pipeline.benchmark.images import images_digest, listed_images
from pipeline.benchmark.page import SUMMARY
from pipeline.benchmark.run import Benchmark, Remaining, run_results
from pipeline.config import ConfigError
from stages.errors import InputError
from stages.files.documents import read_document
from stages.results.method import RECOMMENDED
from stages.results.table import read_summary
from stages.scorers import reads_head
from tests.test_pipeline.command import pipeline, refused
from tests.test_pipeline.test_benchmark.packed import in_tars, made_by, pack
from tests.test_pipeline.tiny import ADAPTERS, STUDY, by_network

SCORES = ["msp", "energy", "knn", "knn+energy", "ncm+energy", "frozen:ncm+energy", "mahalanobis-pp", "auto"]
FROZEN = [score for score in SCORES if score != "frozen:ncm+energy"]  # scores of frozen features
DENSE = """
[[variants]]
name = "dense-1"
set = { "train.experts" = 1 }
seeds = [0]
"""
MORE = f"""
top2 = true
{DENSE}
[[variants]]
name = "static"
set = {{ "train.mixup" = "static" }}
seeds = [1]
"""


@pytest.fixture(scope="module")
def benchmark(vit, tmp_path_factory):
    """Folder of a benchmark: tars in ``data``, the list of their images, two studies, the second with one control."""
    home = tmp_path_factory.mktemp("benchmark")
    pack(home)
    for name, text, more in (("one", STUDY, MORE), ("two", ADAPTERS.replace("epochs = 1", "epochs = 2"), DENSE)):
        text = re.sub("^scores = .*$", f"scores = {json.dumps(SCORES)}", text, flags=re.MULTILINE)
        text = text.replace("[cache]\n", "[cache]\npseudo_ood = 2\n")
        study = by_network(vit, in_tars(text)).replace('work = "work"', 'work = "work"\nseeds = [0, 1]')
        (home / f"{name}.toml").write_text(study.replace('name = "tiny"', f'name = "{name}"') + more)
    return home


BOTH, ONE = ("one", "two"), ("one",)


def results(home, work, *overrides, studies=BOTH, data=None, dry_run=False, page=None, **choice):
    """Text that the verb says of some studies of the benchmark."""
    benchmark = Benchmark([home / f"{study}.toml" for study in studies], home / "listed.csv.gz")
    chosen = Choice([f"cache.root={home}/caches", *overrides], **choice)
    lines = run_results(data or home / "data", work, chosen, dry_run=dry_run, page=page, benchmark=benchmark)
    return [line for line in lines if isinstance(line, str)]


@pytest.fixture(scope="module")
def finished(benchmark, tmp_path_factory):
    """Work folder of the benchmark, run once."""
    work = tmp_path_factory.mktemp("results")
    results(benchmark, work)
    return work


def lines_of(work):
    return list(csv.DictReader(io.StringIO((work / "results.csv").read_text())))


def table_called(work, title):
    """Cells of a table of the page, its header first."""
    shown = (work / "results.md").read_text().split(f"**{title}**\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in shown)
    return [header, *body]


# ----------------------------------------------------------------------------------------------------------- tables


def test_every_method_of_both_benchmarks(finished):
    lines = lines_of(finished)
    assert {line["benchmark"] for line in lines} == {"one", "two"}
    own = [line for line in lines if line["benchmark"] == "one" and line["group"] == "near"]
    assert [(line["features"], line["variant"], line["routing"], line["score"], line["n_seeds"]) for line in own] == [
        *(("cls", "", "none", score, "1") for score in FROZEN),
        *(("mofe", "default", "predicted", score, "2") for score in SCORES),
        ("mofe", "default", "top2", "knn+energy", "2"),
        ("mofe", "default", "oracle", "knn+energy", "2"),
        ("mofe", "dense-1", "predicted", "knn+energy", "1"),
        ("mofe", "static", "predicted", "knn+energy", "1"),
    ]


def test_numbers_are_those_of_the_summary(finished):
    """Judged anew from the scores of the images, and yet the same to the last bit: means, and paired differences."""
    summary = {
        tuple(line[name] for name in ("features", "head", "variant", "routing", "score", "group")): line
        for line in read_summary(finished / "one" / "scores")
        if line["ood"] == "average" and not line["calibrated"]
    }
    for line in lines_of(finished):
        if line["benchmark"] != "one" or line["routing"] == "oracle":  # a diagnostic, which a summary leaves out
            continue
        names = [line[name] for name in ("features", "head", "variant", "routing", "score", "group")]
        for metric in ("fpr95", "auroc"):
            assert float(line[f"{metric}_mean"]) == summary[tuple(names)][f"{metric}_mean"]
            if line["features"] == "cls" and line["score"] in ("knn", "knn+energy"):
                recommended = summary["mofe", "refit", "default", "predicted", "knn+energy", line["group"]]
                for end in ("", "_lo", "_hi"):
                    stated = recommended[f"{metric}_minus_{line['score']}{end}"]
                    assert float(line[f"recommended_minus_{metric}{end}"]) == pytest.approx(stated, abs=1e-12)


def test_seeds_that_both_have_are_compared(finished):
    """The variant `dense-1` was trained with seed 0 alone: it is compared with seed 0 of the default."""
    table = list(csv.DictReader(io.StringIO((finished / "two" / "scores" / "table.csv").read_text())))

    def fpr95(variant, seed):
        wanted = {"features": "mofe", "head": "refit", "variant": variant, "seed": seed, "routing": "predicted"}
        wanted |= {"score": "knn+energy", "calibrated": "false", "ood": "average", "group": "near"}
        (row,) = (row for row in table if wanted.items() <= row.items())
        return float(row["fpr95"])

    wanted = {"benchmark": "two", "variant": "dense-1", "group": "near"}
    (line,) = (line for line in lines_of(finished) if wanted.items() <= line.items())
    assert float(line["recommended_minus_fpr95"]) == pytest.approx(fpr95("default", "0") - fpr95("dense-1", "0"))


def test_words_follow_the_intervals(finished):
    for line in lines_of(finished):
        for metric, sign in (("fpr95", -1), ("auroc", 1)):
            if not (says := line[f"recommended_minus_{metric}_says"]):
                assert line["score"] == "knn+energy"
                continue
            lo, hi = sorted(sign * float(line[f"recommended_minus_{metric}_{end}"]) for end in ("lo", "hi"))
            # An interval that excludes 0 says something only where all that is read beside it allows it.
            alone = "gain" if lo > 0 else "loss" if hi < 0 else "no difference"
            assert says.removesuffix(" for this seed") in (alone, "no difference", "too few images")
            if line["variant"] == "dense-1":  # seed 0 alone
                assert not says.startswith(("gain", "loss")) or says.endswith("for this seed")


def test_id_accuracy_is_that_of_the_head(finished):
    accuracies = json.loads((finished / "one" / "scores" / "id.json").read_text())["accuracy"]
    refit = [entry["accuracy"] for entry in accuracies if entry["head"] == "refit" and entry["variant"] == "default"]
    lines = [line for line in lines_of(finished) if line["benchmark"] == "one" and line["group"] == "far"]
    by_method = {(line["variant"], line["routing"], line["score"]): line["id_accuracy_mean"] for line in lines}
    assert len(refit) == 2
    assert float(by_method["default", "predicted", "knn+energy"]) == pytest.approx(np.mean(refit))
    assert by_method["default", "predicted", "knn"] == by_method["", "none", "knn"] == ""  # no head, no prediction


def test_page_names_what_is_compared(finished):
    page = (finished / "results.md").read_text()
    assert page.count("minus**\n") == 2
    for method in (RECOMMENDED, *JUDGED_AGAINST):
        assert f"| {method_label(method)} |" in page
    assert str(finished) not in page  # a page to be published


def test_page_says_what_was_run(benchmark, finished):
    record = read_document(finished / "one" / "record.json")
    ran = (finished / "results.md").read_text().split("## What was run\n")[1].split("\n## ")[0]
    facts = {cells[1].strip(): cells[2].strip() for line in ran.splitlines() if (cells := line.split("|"))[1:]}
    digest = images_digest(listed_images(benchmark / "listed.csv.gz"))
    assert facts["images"] == f"those of the benchmark's list; SHA-256 of all: {digest}"
    assert facts["seeds"] == "0, 1"
    assert facts["CPU"].startswith(record["hardware"]["cpu"])
    assert f"torch {record['versions']['torch']}" in facts["versions"]
    assert (record["git"] or {"commit": "unknown"})["commit"] in facts["commit"]
    assert facts.keys() >= {"threads", "GPUs"}


def test_the_summary_has_the_recommended_score_and_what_it_is_judged_against(finished):
    text = (finished / "results.md").read_text()
    summary = text.split(SUMMARY[0])[1].split(SUMMARY[1])[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary[2:]]
    names = list(map(method_label, (RECOMMENDED, *JUDGED_AGAINST, *CHOSEN)))
    assert [row[:2] for row in rows] == [[study, name] for study in ("one", "two") for name in names]
    (near,) = (
        line for line in lines_of(finished)
        if (line["benchmark"], line["features"], line["score"], line["group"]) == ("one", "cls", "knn", "near")
    )  # fmt: skip
    (knn,) = (row for row in rows if row[:2] == ["one", "frozen: knn"])
    assert knn[2:4] == [f"{100 * float(near[f'{metric}_mean']):.1f}" for metric in ("fpr95", "auroc")]


# ------------------------------------------------------------------------------------------------------------- runs


def test_auto_is_shown_with_what_it_chose_and_its_regret(finished):
    """On frozen and on refined features, beside the best of all scores of the study."""
    summary = read_summary(finished / "one" / "scores")
    title = "one: what auto chose from ID images, and how far that is behind the best of all scores"
    header, *body = table_called(finished, title)
    # There are too few classes to choose by.
    methods = {"frozen: auto (probe)": ("cls", ""), "MoFE default: auto (refit)": ("mofe", "default")}
    assert [row[:2] for row in body] == [[method, "knn+energy"] for method in methods]
    for group in ("near", "far", "all"):
        lines = [line for line in summary if (line["ood"], line["group"]) == ("average", group)]
        best = min(line["fpr95_mean"] for line in lines if line["score"] != "auto")
        for name, _, *regrets in body:
            (own,) = (
                line for line in lines if (line["features"], line["variant"], line["score"]) == (*methods[name], "auto")
            )
            assert regrets[header.index(f"{group} FPR95 ↓") - 2] == f"{100 * (own['fpr95_mean'] - best):.1f}"


@pytest.mark.parametrize(
    ("title", "pairs"),
    [
        (
            "what auto chose of frozen features, and the frozen baselines",
            [
                ("frozen: auto (probe)", f"frozen: {baseline}")
                for baseline in ("knn", "knn+energy (probe)", "mahalanobis-pp", "ncm+energy (probe)")
            ],
        ),
        (
            "a frozen distance with the experts' energy, and with the probe's",
            [("MoFE default: frozen:ncm+energy (refit)", "frozen: ncm+energy (probe)")],
        ),
    ],
)
def test_pairs_beside_the_recommended_score_are_those_of_the_summary(finished, title, pairs):
    header, *body = table_called(finished, f"one: {title}")
    assert [tuple(row[:2]) for row in body] == pairs
    summary = {
        (line["features"], line["score"], line["variant"]): line
        for line in read_summary(finished / "one" / "scores")
        if (line["ood"], line["group"]) == ("average", "far")
    }
    for method, other, *cells in body:
        own = ("mofe", "frozen:ncm+energy", "default") if "MoFE" in method else ("cls", "auto", "")
        baseline = other.split(" ")[1]
        assert cells[header.index("far FPR95 ↓") - 2].startswith(
            f"{100 * summary[own][f'fpr95_minus_{baseline}']:+.1f} "
            f"[{100 * summary[own][f'fpr95_minus_{baseline}_lo']:+.1f}, "
        )


def test_routing_is_shown_with_what_it_costs(finished):
    """Of mixtures with something to route: how often the router is right, and accuracy as the rows are routed."""
    about = json.loads((finished / "one" / "scores" / "id.json").read_text())["router"]
    own = [entry for entry in about if entry["variant"] == "default"]
    page = (finished / "results.md").read_text()
    _, _, table = page.partition("one: routing of ID test images")
    (line,) = (line for line in table.partition("\n\n")[2].partition("\n\n")[0].splitlines() if "default" in line)
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[:3] == ["default", "2", str(own[0]["experts"])]
    shown = [float(cell.split(" ± ")[0]) for cell in cells[4:]]
    stated = [np.mean([entry["accuracy"] for entry in own])]
    stated += [
        np.mean([entry["id_accuracy"][name]["refit"] for entry in own]) for name in ("predicted", "top2", "oracle")
    ]
    assert shown == pytest.approx(100 * np.array(stated), abs=0.051)
    assert "| dense-1 |" not in table.partition("\n\n")[2].partition("\n\n")[0]


def test_finished_runs_are_not_repeated_and_their_page_is_written_where_it_is_asked_for(benchmark, finished, tmp_path):
    before = made_by(finished / "one", finished / "two")
    made = {name: (finished / name).read_bytes() for name in ("results.csv", "results.md")}
    said = results(benchmark, finished, page=tmp_path / "docs" / "RESULTS.md")
    assert [line.split("; ")[1] for line in said[:2]] == [
        "0 of 4 mixtures to train, in 3 variants",
        "0 of 3 mixtures to train, in 2 variants",
    ]
    assert not [line for line in said if "done" in line or "sets extracted" in line]
    assert made_by(finished / "one", finished / "two") == before
    assert {name: (finished / name).read_bytes() for name in made} == made
    assert (tmp_path / "docs" / "RESULTS.md").read_bytes() == made["results.md"]
    assert said[-1].endswith(f"{tmp_path / 'docs' / 'RESULTS.md'}, {finished / 'results.csv'}")


def test_dry_run(benchmark, tmp_path):
    said = results(benchmark, tmp_path / "work", dry_run=True)
    assert said[0].startswith("one: 4 sets of 152 images; 4 of 4 mixtures to train, in 3 variants; ")
    assert "train pretrained default seed 1: would run" in said
    assert not (tmp_path / "work").exists()


def test_time_to_go():
    """A variant costs what it cost; one that was not trained yet, what the others cost."""
    notes = []

    class Listener:
        def note(self, line):
            notes.append(line)

    remaining = Remaining(Listener())
    for study, variant, cost in ((0, "default", 10), (0, "dense", 10), (1, "default", 40), (1, "dense", 40)):
        remaining.expect(study, variant, cost)
    remaining.trained(0, "default", 10)
    remaining.trained(0, "dense", 50)
    assert notes[0] == "1 of 4 trained, about 1 min 30 s of training to go"
    assert remaining.seconds_left() == 40 * 1 + 40 * 5


# ----------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def other_images(benchmark, tmp_path_factory):
    """The benchmark's folder with other photographs."""
    data = shutil.copytree(benchmark / "data", tmp_path_factory.mktemp("other") / "data")
    shutil.copy(data / "test.tar", data / "photos.tar")
    return data


@pytest.fixture(scope="module")
def unchecked(benchmark, finished, other_images):
    """The page of these after all, without the controls."""
    work = shutil.copytree(finished, other_images.parent / "work")
    results(benchmark, work, studies=ONE, data=other_images, unchecked=True, controls=[])
    return (work / "results.md").read_text()


def test_other_images_are_refused(benchmark, other_images, tmp_path):
    with pytest.raises(InputError, match=r"16 missing \(photos/.*--unchecked"):
        results(benchmark, tmp_path / "work", data=other_images)
    assert not (tmp_path / "work").exists()


def test_other_images_may_be_asked_for(unchecked):
    assert "| images | NOT the benchmark's: 16 missing" in unchecked


def test_some_controls_are_enough(benchmark, finished, unchecked, tmp_path):
    assert "MoFE dense-1: knn+energy" in unchecked  # a baseline stays
    assert "MoFE static" in (finished / "results.md").read_text()
    assert "MoFE static" not in unchecked
    with pytest.raises(ConfigError, match=r"--controls: .*'statik'.*'static'"):
        results(benchmark, tmp_path / "work", controls=["statik"])


def test_benchmarks_that_there_are_not_are_refused(benchmark, tmp_path):
    with pytest.raises(ConfigError, match=r"--benchmarks: .*'tow'; did you mean 'two'"):
        results(benchmark, tmp_path / "work", benchmarks=["tow"])
    with pytest.raises(ConfigError, match="--benchmarks: none is named; known: one, two"):
        results(benchmark, tmp_path / "work", benchmarks=[])


def test_what_cannot_be_compared_is_refused_before_any_work(benchmark, tmp_path):
    with pytest.raises(ConfigError, match=r"one: .* MoFE default: knn\+energy \(refit\), frozen: knn,"):
        results(benchmark, tmp_path / "work", 'score.scores=["msp"]')
    assert not (tmp_path / "work").exists()


def test_command_line_refuses_a_folder_that_is_not_there(tmp_path):
    assert refused("results", tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder; give the one that")
    assert refused("results", tmp_path).startswith(f"{tmp_path} does not hold the benchmark's images: 4310 missing (")
    assert pipeline("results").status == 2


# -------------------------------------------------------------------------------------------------------- fine-tunes


def test_fine_tuned_rows_are_an_option_that_goes_on(benchmark, finished, tmp_path, capsys):
    """They stand beside the others, whose lines stay as they were; the same command again makes nothing anew.

    Without the option, of one benchmark among several, and of which a mixture is lost as
    after a kill: that one is trained again, and all is as it was.
    """
    work, options = tmp_path / "results", {"studies": ONE, "finetune": True}
    shutil.copytree(finished, work)
    tune = ["finetune.epochs=1", "finetune.seeds=[0]", 'finetune.variants=["default"]', "finetune.joint=1"]
    results(benchmark, work, *tune, **options)
    before = {tuple(line.values()) for line in lines_of(finished) if line["benchmark"] == "one"}
    lines = lines_of(work)
    assert before <= {tuple(line.values()) for line in lines}
    own = [line for line in lines if line["backbone"] == "finetuned"]
    near = [(line["features"], line["head"], line["score"], line["n_seeds"]) for line in own if line["group"] == "near"]
    assert near == [
        *(("cls", "finetune" if reads_head(score) else "none", score, "1") for score in FROZEN[:-1]),
        ("cls", "probe", "auto", "1"),
        ("cls", "probe", "knn+energy", "1"),
        *[("mofe", "refit", "knn+energy", "1")] * 2,
    ]
    assert [line["variant"] for line in own if (line["features"], line["group"]) == ("mofe", "near")] == [
        "default",
        "joint",
    ]
    assert all(line["id_accuracy_mean"] for line in own if line["head"] != "none")
    check_fine_tuning_table(work)
    models = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    results(benchmark, work, *tune, **options)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")} == models
    shutil.rmtree(work / "one" / "model" / "pretrained" / "static")
    capsys.readouterr()
    said = results(benchmark, work, *tune, benchmarks=["one"])
    assert [line.split(":")[0] for line in said if ": done" in line] == ["train pretrained static seed 1"]
    assert "1 of 1 trained, about 0.0 s of training to go" in capsys.readouterr().err
    assert {tuple(line.values()) for line in lines_of(work)} == before


def check_fine_tuning_table(work):
    """Each method with itself on the pre-trained features, and mixtures with each other; by the seed that both have."""
    text = (work / "results.md").read_text()
    assert text.count("what fine-tuning changes**\n") == 1
    header, *body = table_called(work, "one: what fine-tuning changes")
    pairs = {tuple(line[:2]): line[2:] for line in body}
    assert next(iter(pairs)) == ("fine-tuned: msp (finetune)", "frozen: msp (probe)")
    default, joint = (f"fine-tuned, MoFE {name}: knn+energy (refit)" for name in ("default", "joint"))
    frozen = ("fine-tuned: knn+energy (probe)", "frozen: knn+energy (probe)")
    assert list(pairs)[-7:] == [
        (default, "MoFE default: knn+energy (refit)"),
        *((default, other) for other in frozen),
        *((joint, other) for other in (default, "MoFE default: knn+energy (refit)", *frozen)),
    ]
    table = csv.DictReader(io.StringIO((work / "one" / "scores" / "table.csv").read_text()))
    wanted = {"features": "mofe", "head": "refit", "variant": "default", "seed": "0", "routing": "predicted"}
    wanted |= {"score": "knn+energy", "calibrated": "false", "ood": "average", "group": "far"}
    auroc = {row["backbone"]: float(row["auroc"]) for row in table if wanted.items() <= row.items()}
    cell = pairs[default, "MoFE default: knn+energy (refit)"][header.index("far AUROC ↑") - 2]
    assert float(cell.split()[0]) == pytest.approx(100 * (auroc["finetuned"] - auroc["pretrained"]), abs=0.051)
