"""docs/attention.md says what the code is, today."""

import inspect
import json
import re

import attn_jax
from eval import attention_docs
from eval.attention_docs import ADVICE, DOCUMENT, descriptions, main, section, support_matrix
from eval.measure import PASSES, environment

OURS = [n for n, m in attn_jax.MECHANISMS.items() if inspect.getmodule(m.module).__name__.startswith("attn_jax.")]


def test_the_generated_parts_are_up_to_date():
    """Renew them with `python -m eval.attention_docs`."""
    text = DOCUMENT.read_text()
    assert section(text, "support") == support_matrix()
    assert section(text, "mechanisms") == descriptions()


def test_every_mechanism_is_measured_and_has_advice():
    """Renew it with `python -m eval.benchmark` and `python -m eval.attention_docs --benchmark FILE`."""
    assert set(ADVICE) == set(OURS)
    assert set(re.findall(r"^\| `(\w+)`", section(DOCUMENT.read_text(), "measured"), re.MULTILINE)) == set(OURS)


def test_measurements_replace_their_section_and_nothing_else(tmp_path):
    ok = {"status": "ok", "wall": 0.25, "cpu": 0.5, "temp_bytes": 2**20}
    result = environment() | {
        "flags": {"lengths": [64, 4096], "dim": 8, "heads": 2, "dtype": "float32", "causal": False}
        | {"repeats": 1, "budget": 1.0},
        "checks": {"local": {}},
        "growth": [{"mechanism": "local", "pass": p, "length": n} | ok for p in PASSES for n in (64, 4096)],
    }
    (tmp_path / "benchmark.json").write_text(json.dumps(result))
    out = tmp_path / "attention.md"
    main(["--benchmark", str(tmp_path / "benchmark.json"), "--out", str(out)])
    before, after = DOCUMENT.read_text(), out.read_text()
    row = section(after, "measured").splitlines()[-1]
    assert "250 ms (500), 1.00 MiB" in row and "| 4,096 " in row and ADVICE["local"] in row
    blank = attention_docs._with_section
    assert blank(after, "measured", "") == blank(before, "measured", "")
