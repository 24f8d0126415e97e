"""`python -m eval.compare`: the numbers, what it says about bad input, and a page that can be read anywhere."""

import html
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx

from attn_jax import MECHANISMS
from configs import lra_listops, lra_text
from eval.compare import maps, report
from eval.compare.__main__ import main
from eval.compare.comparison import compare
from eval.compare.document import page
from eval.experiments import statistics
from tests.runs import outcome
from train import loop, tasks
from train.config import to_dict
from train.tasks.lra import Text
from train.workdir import open_workdir, write_json, write_metrics

EXAMPLES = 40
ROUNDING = 1e-12  # of float64 sums


def fabricate(folder, mechanism="standard", seed=0, values=None, settings=None, result=None, config="lra_listops"):
    """A finished run of the default preset whose test examples have the accuracies `values`."""
    values = np.full(EXAMPLES, 0.5) if values is None else np.asarray(values)
    folder.mkdir(parents=True)
    options = {key: value for key, value in MECHANISMS[mechanism].options().items() if isinstance(value, int)}
    made = {"name": config, "preset": "default", "seed": seed, "file": "", "steps": 100, "model": {"dim": 8}}
    made |= {"mechanism": {"name": mechanism, **options}, "task": {"name": "no such task"}}
    for key, value in (settings or {}).items():
        section, _, name = key.rpartition(".")
        (made[section] if section else made)[name] = value
    write_json(folder / "config.json", made)
    found = {"name": config, "preset": "default", "mechanism": mechanism, "seed": seed}
    found |= {"comparable": False, "comparability": "fabricated", "primary": "accuracy", "better": "higher"}
    found |= {"test": {"accuracy": float(values.mean()), "loss": 2.0}, "baselines": {"majority": 0.17}}
    found |= {"best_step": 100, "steps": 100, "epochs_to_90_percent_of_best": 1.5, "seconds_per_step": 0.25}
    found |= {"peak_memory_bytes": 2**30, "parameters": 1000, "devices": "1 x cpu"}
    write_json(folder / "result.json", found | (result or {}))
    write_json(folder / "test_examples.json", {"accuracy": values.tolist(), "loss": [2.0] * len(values)})
    curve = [(step, split) for step in (50, 100) for split in ("train", "val")]
    curve = [{"step": s, "split": split, "loss": 3 - s / 100, "accuracy": s / 200 + seed} for s, split in curve]
    write_metrics(folder / "metrics.jsonl", [*curve, {"step": 100, "split": "test", "accuracy": 0.5}])
    return folder


def settings_of(folders):
    (section,) = compare(folders).to_json()["sections"]
    return {setting["label"]: setting for setting in section["settings"]}, section


# The numbers.


@pytest.mark.parametrize("better, sign", [("higher", 1), ("lower", -1)])
def test_the_numbers_are_those_computed_by_hand(tmp_path, better, sign):
    hits = np.random.default_rng(0).random((2, EXAMPLES))
    folders = []
    for mechanism, factor in (("performer", 0.8), ("standard", 1.0)):
        for seed in (1, 0):
            costs = {
                "better": better,
                "seconds_per_step": 0.1 + 0.2 * seed,
                "peak_memory_bytes": 2**30 * (1 + seed),
            }
            folder = tmp_path / f"{mechanism}-{seed}"
            folders.append(fabricate(folder, mechanism, seed, factor * hits[seed], result=costs))
    found, section = settings_of(folders)
    assert list(found) == ["standard", "performer"] and section["baselines"] == {"majority": 0.17}
    means = hits.mean(axis=1)
    for label, factor in (("standard", 1.0), ("performer", 0.8)):
        setting = found[label]
        low, high = setting["interval"]
        assert setting["mean"] == pytest.approx(factor * means.mean(), abs=ROUNDING)
        assert setting["deviation"] == pytest.approx(factor * abs(means[0] - means[1]) / 2**0.5, abs=ROUNDING)
        assert low < setting["mean"] < high
        assert setting["seeds"] == [0, 1] and setting["folders"] == [
            str(tmp_path / f"{label}-{s}") for s in (0, 1)
        ]
        assert setting["seconds_per_step"] == pytest.approx(0.2) and setting["peak_memory_bytes"] == 1.5 * 2**30
        assert setting["epochs_to_90_percent_of_best"] == 1.5 and setting["parameters"] == 1000
    # The same examples scaled: paired, they differ by the factor in every resample.
    assert found["performer"]["improvement"] == pytest.approx(-0.2 * sign, abs=ROUNDING)
    assert found["performer"]["improvement_interval"] == pytest.approx([-0.2 * sign] * 2, abs=ROUNDING)
    assert found["standard"]["improvement"] is None
    assert found["standard"]["published"] == 0.3637 and found["performer"]["published"] == 0.1801


def test_a_curve_is_the_mean_over_the_seeds(tmp_path):
    (section,) = compare(fabricate(tmp_path / str(seed), seed=seed) for seed in (0, 1)).sections
    assert section.settings[0].curve("val", "accuracy") == [(50, 0.75), (100, 1.0)]
    assert section.settings[0].curve("val", "nope") == []


def test_equal_examples_are_resampled_as_many_as_single_ones(monkeypatch):
    random = np.random.default_rng(0)
    binary = (random.random((1, 200)) < 0.3).astype(float)
    (draws,) = statistics.resampled_means(binary)
    p = binary.mean()
    # Of 10,000 draws: a mean is off by 1 % of a deviation, a variance by 1.4 %; five times that.
    assert abs(draws.mean() - p) < 0.05 * draws.std()
    np.testing.assert_allclose(draws.var(), p * (1 - p) / 200, rtol=0.07)
    runs = random.random((3, 30))
    generator = np.random.default_rng(0)
    by_seed, by_example = (generator.multinomial(n, np.full(n, 1 / n), statistics.DRAWS) / n for n in runs.shape)
    naive = np.einsum("ds,se,de->d", by_seed, runs, by_example)
    for limit in (2**24, 30 * 7):
        monkeypatch.setattr(statistics, "_MAX_WEIGHTS", limit)
        np.testing.assert_allclose(statistics.resampled_means(runs)[0], naive, atol=ROUNDING)


# What belongs together.


def test_settings_are_told_apart_by_what_differs(tmp_path):
    folders = [
        fabricate(tmp_path / "a", "local", settings={"mechanism.window": 4}),
        fabricate(tmp_path / "b", "local", settings={"mechanism.window": 8, "steps": 200}),
        fabricate(tmp_path / "c"),
        fabricate(tmp_path / "d", settings={"steps": 200}),
    ]
    found, section = settings_of(folders)
    assert list(found) == [
        "standard steps=100",
        "standard steps=200",
        "local window=4 steps=100",
        "local window=8 steps=200",
    ]
    assert found["local window=8 steps=200"]["reference"] == "standard steps=200"
    assert found["local window=4 steps=100"]["reference"] == "standard steps=100"
    assert section["differing_settings"]["mechanism.window"] == [None, None, 4, 8]


def test_other_test_data_is_another_section(tmp_path):
    folders = [
        fabricate(tmp_path / "a"),
        fabricate(tmp_path / "b", config="video_slots"),
        fabricate(tmp_path / "c", settings={"task.size": 5}, result={"baselines": {"majority": 0.2}}),
    ]
    sections = compare(folders).sections
    assert [section.title for section in sections] == [
        "lra_listops, preset default (task.size=absent)",
        "video_slots, preset default",
        "lra_listops, preset default (task.size=5)",
    ]
    assert not sections[1].published and sections[0].published["Reformer"] == 0.3727


def test_what_a_reader_must_know_is_said(tmp_path):
    folders = [
        fabricate(tmp_path / "a", "local", result={"parameters": 1021}),
        fabricate(tmp_path / "b", "performer", seed=0, result={"devices": "1 x H100"}),
        fabricate(tmp_path / "c", "performer", seed=1),
    ]
    (tmp_path / "c" / "test_examples.json").unlink()
    (tmp_path / "c" / "metrics.jsonl").unlink()
    found, section = settings_of(folders)
    remarks = "\n".join(section["remarks"])
    for expected in (
        "no run of `standard`",
        "`local` has 1,021 parameters, 2% more than `performer` with 1,000",
        "One seed only, so no deviation and no interval: `local`.",
        "Intervals over 2 seeds are too narrow",
        "test_examples.json is missing or of other examples: `performer`",
        "No learning curves, because metrics.jsonl is missing or empty: c.",
        "different devices: 1 x H100, 1 x cpu",
        "do not have the same seeds",
    ):
        assert expected in remarks
    assert found["local"]["deviation"] is found["local"]["interval"] is found["local"]["improvement"] is None
    equal = [fabricate(tmp_path / f"e{n}", result={"parameters": n}, seed=n) for n in (1000, 1019)]
    assert not any("equally large" in line for line in compare(equal).sections[0].remarks)


# Bad input.


def damaged(folder):
    (folder / "result.json").write_text("{")


def incomplete(folder):
    write_json(folder / "result.json", {"name": "a"})


def undefined(folder):
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"test": {"accuracy": float("nan")}})


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (damaged, "cannot read"),
        (incomplete, "no or unknown preset, mechanism,"),
        (undefined, "its test accuracy is nan"),
        (lambda folder: write_json(folder / "result.json", []), "it is no JSON object"),
        (lambda folder: (folder / "result.json").unlink(), "is not finished"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "metrics.jsonl").write_text("nonsense\n"), "cannot read"),
        (lambda folder: write_json(folder / "test_examples.json", {}), "it has no accuracy"),
    ],
)
def test_what_is_no_run_is_left_out_and_said(tmp_path, spoil, expected):
    good, bad = fabricate(tmp_path / "good"), fabricate(tmp_path / "bad", "local")
    spoil(bad)
    (line,) = compare([good, bad]).left_out
    assert expected in line and str(bad) in line and "\n" not in line
    code, _, error = outcome(main, bad, "--out", tmp_path / "out")
    assert code == 2 and error.startswith("error: there is no finished run") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_counts_once(tmp_path):
    run = fabricate(tmp_path / "run")
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    comparison = compare([run, tmp_path / "copy" / ".." / "run", copied])
    twice, repeated = comparison.left_out
    assert "given twice" in twice and f"{copied} repeats {run}" in repeated
    assert len(comparison.sections[0].settings[0].runs) == 1


def test_wrong_requests_are_one_line(tmp_path):
    for argv, expected in (([], "DIR"), ([tmp_path / "nope"], "no folder")):
        code, _, error = outcome(main, *argv)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and expected in error
    code, out, _ = outcome(main, "--help")
    assert code == 0 and "python -m eval.compare runs/" in out and "--no-maps" in out


# The report.


def test_the_report_is_one_file_and_the_same_again(tmp_path):
    folders = [fabricate(tmp_path / f"{m}{s}", m, s) for m in ("standard", "vq") for s in (0, 1)]
    (tmp_path / "empty").mkdir()
    out = tmp_path / "new" / "out"
    code, printed, error = outcome(main, *folders, tmp_path / "empty", "--out", out)
    assert code == 0 and error.startswith("left out: no config.json")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(files) == ["report.html", "report.json", "report.md"]
    text = files["report.html"].decode()
    assert "http" not in text and "src=" not in text and "<script" not in text and "@import" not in text
    links = re.findall(r'href="([^"]*)"', text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert all(link.startswith("data:") or link.removeprefix("#") in ids for link in links)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    # The task cannot be made, so there are no maps, and the report says why.
    assert "No map of <code>vq</code>: task.name <code>no such task</code> is not one of" in text
    markdown = files["report.md"].decode()
    assert "| standard " in printed and "| standard " in markdown and str(out / "report.html") in printed
    assert json.loads(files["report.json"])["sections"][0]["settings"][1]["label"] == "vq"
    assert outcome(main, *folders, tmp_path / "empty", "--out", out)[0] == 0
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_text_of_runs_is_no_markup(tmp_path):
    run = fabricate(tmp_path / "run", result={"comparability": "<script>alert('a')</script> | b"})
    comparison = compare([run])
    blocks = list(report.blocks(comparison, None))
    assert "<script" not in page("<b>", blocks) and "&lt;b&gt;" in page("<b>", blocks)


# Attention maps.


def tiny(mechanism, **model):
    config = lra_listops.get_config(f"smoke,{mechanism}")
    config.model.update(dict(dim=8, num_heads=1, num_layers=1, mlp_dim=8, dropout=0.0, pool="first") | model)
    config.task.generator.update(num_train=64, num_val=8, num_test=8, max_length=30)
    config.task.buckets = (32,)
    config.update(batch_size=8, eval_batch_size=8, steps=2, eval_every=2, log_every=1)
    config.mesh.data = 1
    return config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_JAX_CACHE", str(tmp_path / "cache"))


def test_maps_are_the_weights_of_what_the_modules_read():
    task = tasks.prepare(tiny("standard", pool="cls", num_heads=2, num_layers=2))
    model = nnx.jit(lambda: task.model(nnx.Rngs(0)))()
    model.eval()
    kind = type(model.transformer.blocks[0].attention)
    before = {"__call__": vars(kind).get("__call__")}
    batch = {name: array[:1] for name, array in next(iter(task.eval_batches("test"))).items()}
    found = maps.attention_weights(task, model, batch)
    assert list(found) == ["transformer.blocks.0.attention", "transformer.blocks.1.attention"]
    assert before == {"__call__": vars(kind).get("__call__")}  # nothing records any more
    real = int(batch["mask"].sum()) + 1  # CLS in front
    for weights in found.values():
        assert weights.shape == (33, 33)
        np.testing.assert_allclose(weights[:real].sum(1), 1, atol=1e-5)  # float32 sums of 33 terms
        assert not weights[:, real:].any()

    @jax.jit
    def expected():  # the first module reads the normalised embeddings
        copied, seen = nnx.clone(model), []
        block = copied.transformer.blocks[0]
        block.attention_norm, norm = (lambda x: seen.append(x) or norm(x)), block.attention_norm
        mask = np.pad(batch["mask"], ((0, 0), (1, 0)), constant_values=True)
        copied(batch["tokens"], mask=batch["mask"])
        return block.attention.attention_weights(norm(seen[0]), mask=mask)[0].mean(0)

    np.testing.assert_allclose(found["transformer.blocks.0.attention"], expected(), atol=1e-6)  # two programs


def test_a_finished_run_shows_where_its_model_attends(tmp_path):
    run, without, broken = (tmp_path / name for name in ("run", "without", "broken"))
    with open_workdir(run, tiny("standard")):
        result = loop.train(tiny("standard"), run)
    for folder in (without, broken):
        shutil.copytree(run, folder)
    write_json(without / "config.json", to_dict(tiny("mamba")))
    write_json(without / "result.json", result | {"mechanism": "mamba"})
    write_json(broken / "config.json", to_dict(tiny("standard")) | {"steps": 3})
    shutil.rmtree(broken / "checkpoints")
    other = tmp_path / "other"  # a version before some setting was there
    shutil.copytree(run, other)
    settings = {key: value for key, value in to_dict(tiny("standard")).items() if key != "sharding_rules"}
    write_json(other / "config.json", settings | {"steps": 4})
    (drawn,) = maps.draw(comparison := compare([run, without, broken, other]))
    (shown,) = drawn.of.values()
    words = drawn.example.split()
    assert words[0] in ("[MIN", "[MAX", "[MED", "[SM") and list(shown[0].keys[: len(words)]) == words
    assert drawn.without["mamba"] == "it gave no attention weights"
    assert "no checkpoint" in drawn.without["standard steps=3"]
    assert "cannot be restored: AttributeError" in drawn.without["standard steps=4"]
    text = page("title", list(report.blocks(comparison, [drawn])))
    assert "Attention map of standard steps=2, module transformer.blocks.0.attention" in text
    assert "No map of <code>mamba</code>: it gave no attention weights." in text


def test_bytes_read_as_characters():
    batch = {"tokens": np.array([[98, 33, 11, 256, 0, 0]]), "mask": np.array([[True] * 4 + [False] * 2])}
    assert Text(lra_text.get_config()).example_text(batch, 0) == ["a", "␣", "↵", "ff"]


# The page in a browser.


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)));
const logged = console.error;
console.error = (...said) => { errors.push(said.join(" ")); logged(...said); };
addEventListener("load", () => {
  const overlap = (nodes, most) => {  // pairs whose boxes share more than `most` pixels both ways
    const full = nodes.filter(node => node.textContent.trim());
    const boxes = full.map(node => [node.textContent.trim(), node.getBoundingClientRect()]);
    const found = [];
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (across > most && down > most) found.push(a + " / " + b);
    }));
    return found;
  };
  const all = (selector, root) => [...(root || document).querySelectorAll(selector)];
  const outside = all("figure svg").flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return all("text", svg).filter(text => {
      const box = text.getBoundingClientRect();
      return box.left < frame.left - 1 || box.right > frame.right + 1;
    }).map(text => text.textContent);
  });
  const found = {
    width: innerWidth, errors, outside,
    wide: document.documentElement.scrollWidth - innerWidth,
    figures: all("figure svg").flatMap(svg => overlap(all("text", svg), 2)),
    text: overlap(all("h1, h2, h3, th, td, p, li li, main > ul"), 1),
    cut: all("th, td").filter(cell => cell.scrollWidth > cell.clientWidth + 1).map(cell => cell.textContent),
    unnamed: all("figure svg").filter(svg => !svg.getAttribute("aria-label")).length,
    smallest: Math.min(...all("figure text").filter(text => text.textContent.trim()).map(text => {
      const box = text.getBoundingClientRect();
      return Math.max(box.width, box.height);
    })),
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""

# A window of a browser cannot be as narrow as a telephone, a frame can.
FRAME = """
<body><iframe src="%s" style="width: %dpx; height: 900px; border: 0"></iframe>
<script>
addEventListener("message", event => { document.body.textContent = event.data; });
</script>
"""


@pytest.fixture(scope="module")
def probed_page(tmp_path_factory):
    """A report of some mechanisms, with long labels, with maps."""
    folders, tmp_path = [], tmp_path_factory.mktemp("runs")
    for place, mechanism in enumerate(("gravitational_multi_timescale", "local", "mamba", "standard", "vq")):
        for seed in (0, 1):
            hits = np.random.default_rng([place, seed]).random(EXAMPLES) < 0.3
            folders.append(fabricate(tmp_path / f"{mechanism}-{seed}", mechanism, seed, hits * 1.0))
    for name, value in (("a-long-name-of-a-run" * 4, 0.0123456), ("b", 1)):
        wide = {"model.a_setting_with_a_long_name": value, "mechanism.window": 256}
        folders.append(fabricate(tmp_path / name, "local", settings=wide))
    comparison = compare(folders)
    words = ["[MAX", "7", "information", "␣"] * 6
    weights = np.random.default_rng(0).random((24, 24))
    shown = maps.Map("transformer.blocks.0.attention", weights, words, words)
    slots = maps.Map("encoder.blocks.0.attention", weights[:6], [str(n) for n in range(6)], words)
    of = {setting.label: [shown, slots] for setting in comparison.sections[0].settings[-2:]}
    drawn = maps.Maps(" ".join(words), of, {"mamba": "it gave no attention weights"})
    path = tmp_path / "probed.html"
    path.write_text(page("A page", list(report.blocks(comparison, [drawn]))).replace("<head>", "<head>" + PROBE))
    return path


@pytest.mark.skipif(browser() is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_overlaps(probed_page, tmp_path, width):
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path}"),
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (probed_page.as_uri(), width))
    flags += ("--virtual-time-budget=10000", "--window-size=1400,900")
    command = [browser(), *flags, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search("<body>({.*})</body>", done.stdout, re.DOTALL).group(1)))
    assert found.pop("width") == width
    assert found.pop("wide") <= 0
    assert found.pop("smallest") >= 8  # pixels
    assert found == {"errors": [], "outside": [], "figures": [], "text": [], "cut": [], "unnamed": 0}
