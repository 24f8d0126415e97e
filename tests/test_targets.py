"""`python -m eval.targets`: what it reads out of compilers, what it refuses, and that it goes on where it was."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import attn_jax
from eval import aot, target_report, targets, vendors, work
from eval.measure import PASSES
from train import cli

H100 = vendors.TARGETS["h100"]

needs = {
    family: pytest.mark.skipif(vendors.obstacle(family) is not None, reason=str(vendors.obstacle(family)))
    for family in ("CUDA", "TPU")
}


def outcome(capsys, *argv):
    """Exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as exit:
        cli.run(targets.main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


# What compilers say.

PTXAS = """\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scan_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for scan_forward_mosaic_gpu_kernel
    80 bytes stack frame, 160 bytes spill stores, 112 bytes spill loads
ptxas info    : Used 167 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 71.502 ms
"""
RESOURCES = (
    "Resources(smem_scratch_bytes=51200, tmem_scratch_cols=0, tmem_collective_scratch_cols=0,"
    " barrier_counts=Counter({Barrier(arrival_count=2, num_barriers=1, orders_tensor_core=False): 1}))"
)
SASS = """\
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   -:2:-:Y:01        /*0740*/                   @UP5 UTMALDG.4D [UR40], [UR26]
   -:1:-:Y:01        /*0ac0*/                   @!P1 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR32], R24
   -:1:-:Y:01        /*0ad0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR32], R24
   -:1:-:Y:01        /*0ae0*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64]
"""


def test_the_logs_of_ptxas_mosaic_and_nvdisasm_are_read():
    assert aot.ptxas_resources(PTXAS) == {"registers": 167, "spill_bytes": 272, "serialised": 1}
    assert aot.shared_memory(RESOURCES) == 51200
    assert aot.instructions(SASS) == {"HGMMA": 2, "LDGSTS": 1, "UTMALDG": 1}
    for reader in (aot.ptxas_resources, aot.shared_memory):
        with pytest.raises(ValueError, match="no"):
            reader("something else")


def call(kernel, flops):
    cost = f"{{\\22flops\\22: {flops}, \\22transcendentals\\22: 7, \\22bytes_accessed\\22: 9}}"
    return (
        '  %mpmd_map.1 = bf16[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="'
        f'jit(f)/transpose(jvp())/{kernel}/mpmd_map" stack_frame_id=7}}, '
        f'backend_config={{cost_estimate_json = "{cost}"}}\n'
    )


def test_kernels_are_those_that_the_program_calls_with_the_largest_of_their_variants(tmp_path):
    for number, (registers, shared) in enumerate([(100, 9), (90, 70)]):
        (tmp_path / f"scan_forward_{number}.ptxas").write_text(PTXAS.replace("167", str(registers)))
        (tmp_path / f"scan_forward_{number + 2}.resources.txt").write_text(RESOURCES.replace("51200", str(shared)))
    (tmp_path / "unused_7.ptxas").write_text(PTXAS)
    (tmp_path / "scan_forward_0.mlir-passes.log").write_text("of no interest")
    other = '  %dot = bf16[8]{0} custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="a/b"}\n'
    found = aot.kernels(call("scan_forward", 5) + other + call("scan_forward", 6), tmp_path)
    assert found == {
        "scan_forward": {"calls": 2, "flops": 11, "exponentials": 14, "bytes": 18}
        | {"registers": 100, "spill_bytes": 272, "serialised": 1, "shared_memory": 70}
    }


PROGRAM = """\
  %all-reduce-start.6 = ((bf16[8,2001,512]{2,1,0}), bf16[8,2001,512]{2,1,0}) all-reduce-start(%b), channel_id=32
  %all-reduce-done.6 = bf16[8,2001,512]{2,1,0} all-reduce-done(%all-reduce-start.6)
  %all-reduce.2 = (f32[], f32[3]{0}) all-reduce(%a, %b), channel_id=35
  %all-gather-start = ((f32[512]{0}, bf16[8,2001,256]{2,1,0}), (f32[1024]{0}, /*index=5*/bf16[8,2001,512])) \
all-gather-start(%x, %y), dimensions={0}
  %all-gather-done = (f32[1024]{0}, bf16[8,2001,512]{2,1,0}) all-gather-done(%all-gather-start)
  %all-gather.90 = f32[2,1,512]{2,1,0:T(1,128)S(1)} all-gather(%bitcast.1313), channel_id=162, dimensions={0}
  %all-gather.91 = f32[1024,512]{1,0} all-gather(%bitcast.1), channel_id=163, dimensions={0}
"""


def test_collectives_are_counted_and_what_is_gathered_is_told_apart():
    assert aot.collectives(PROGRAM) == {"all-reduce": 2, "all-gather": 3}
    variables = {(512,), (256, 512)}  # what 1024 x 512 is on one of four devices
    assert aot.gathered(PROGRAM, variables, (4, 1, 2)) == {
        "state": {"f32[1024]": 1, "f32[2,1,512]": 1, "f32[1024,512]": 1},
        "activations": {"bf16[8,2001,512]": 1},
    }


# What cannot be honoured.


def without(monkeypatch, *missing, **versions):
    def version(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name.replace("-", "_"), "1.0")

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_compilers_are_one_line_that_says_what_to_install(capsys, monkeypatch, tmp_path):
    without(monkeypatch, "jax-cuda12-plugin", "libtpu")
    code, _, error = outcome(capsys, "--output", tmp_path / "t.md")
    assert code == 2 and error.count("\n") == 1 + error.count("left out")
    assert "CUDA targets need jax-cuda12-plugin: pip install -e '.[targets]'" in error
    assert "TPU targets need libtpu: pip install -e '.[targets]'" in error
    assert not list(tmp_path.iterdir())


def test_one_family_is_enough_unless_the_other_is_asked_for(capsys, monkeypatch):
    without(monkeypatch, "libtpu")
    assert targets._possible(None) == ["a100", "l4", "h100", "b200"]
    assert "left out: TPU targets need libtpu" in capsys.readouterr().err
    with pytest.raises(cli.UsageError, match="TPU targets need libtpu"):
        targets._possible(["h100", "v5e"])


def test_a_plugin_for_another_jax_is_refused(monkeypatch):
    without(monkeypatch, jax="0.12.1", jax_cuda12_plugin="0.12.0")
    assert "need jax-cuda12-plugin 0.12.1, as JAX, not 0.12.0" in vendors.obstacle("CUDA")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--targets", "h100,nope"], "'nope'; there are a100, l4, h100, b200, v5e, v6e"),
        (["--mechanisms", "nope"], "'nope'"),
        (["--lengths", "64,-1"], "positive integers"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_a_request_that_cannot_be_honoured(capsys, argv, expected):
    code, _, error = outcome(capsys, *argv)
    assert code == 2 and error.count("\n") == 1 and expected in error


# Processes.

RECORD = {"memory": "L", "programs": [{"pass": p, "length": 64, "status": "ok", "temp_bytes": 7} for p in PASSES]}


@pytest.fixture
def installed(monkeypatch):
    """As if there were compilers: the keys of the jobs that were started, and what becomes of a job."""
    monkeypatch.setattr(vendors, "obstacle", lambda family: None)
    monkeypatch.setattr(vendors, "versions", lambda family: {"jax": "1.0"})
    monkeypatch.setattr(targets, "fingerprint", lambda kind: "0")
    state = SimpleNamespace(started=[], result=lambda job: RECORD)

    def run(self, job):
        state.started.append(job.key)
        return state.result(job)

    monkeypatch.setattr(targets._Processes, "run", run)
    return state


def compile_two(capsys, tmp_path, *argv):
    selection = ("--targets", "h100", "--mechanisms", "local,vq", "--lengths", "64", "--jobs", 1)
    return outcome(capsys, *selection, "--output", tmp_path / "targets.md", *argv)


def test_an_interrupted_command_goes_on_and_a_finished_one_has_nothing_to_do(installed, tmp_path, capsys):
    def interrupted(job):
        if job.mechanism == "vq":
            raise KeyboardInterrupt
        return RECORD

    installed.result = interrupted
    assert compile_two(capsys, tmp_path)[0] == 130
    assert list(json.loads((tmp_path / "targets.json").read_text())) == ["h100 local module"]
    installed.result = lambda job: RECORD
    assert compile_two(capsys, tmp_path)[0] == 0
    assert installed.started == ["h100 local module", "h100 vq module", "h100 vq module"]
    assert compile_two(capsys, tmp_path)[0] == 0
    assert len(installed.started) == 3
    text = (tmp_path / "targets.md").read_text()
    assert "`local`" in text and "`vq`" in text and "jax 1.0" in text


@pytest.mark.parametrize("change", ["lengths", "versions", "code", "died"])
def test_what_would_be_found_anew_is_compiled_anew(installed, tmp_path, capsys, monkeypatch, change):
    if change == "died":
        installed.result = lambda job: {"status": "the process ended with -6: LLVM ERROR"}
        code, _, error = compile_two(capsys, tmp_path)
        assert code == 1 and "2 of 2 did not compile: h100 local module, h100 vq module" in error
        assert "LLVM ERROR" in (tmp_path / "targets.md").read_text()
        installed.result = lambda job: RECORD
    else:
        assert compile_two(capsys, tmp_path)[0] == 0
    if change == "versions":
        monkeypatch.setattr(vendors, "versions", lambda family: {"jax": "2.0"})
    if change == "code":
        monkeypatch.setattr(targets, "fingerprint", lambda kind: "1")
    assert compile_two(capsys, tmp_path, *(["--lengths", "32"] if change == "lengths" else []))[0] == 0
    assert len(installed.started) == 4


def test_a_sequence_too_long_for_the_memory_is_a_result_and_no_failure(installed, tmp_path, capsys):
    full = {"pass": PASSES[1], "length": 128, "status": "JaxRuntimeError: RESOURCE_EXHAUSTED: 20G of 16G"}
    installed.result = lambda job: RECORD | {"programs": [*RECORD["programs"], full]}
    assert compile_two(capsys, tmp_path, "--lengths", "64,128")[0] == 0
    text = (tmp_path / "targets.md").read_text()
    assert (
        re.search(r"\| `local` +\| XLA", text) and "- no: local, 128 tokens, forward+backward: JaxRuntime" in text
    )
    assert compile_two(capsys, tmp_path, "--lengths", "128")[0] == 1


def interpreter(tmp_path, script):
    """A program that is run in the place of Python."""
    path = tmp_path / "interpreter"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_ends_its_process_is_a_result(tmp_path, monkeypatch, capsys):
    script = (
        """echo '{"progress": "so far"}'; echo 'LLVM ERROR: Cannot select' >&2; echo noise >&2; kill -ABRT $$"""
    )
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, script))
    record = targets._Processes(timeout=60).run(aot.Job("h100", "local"))
    assert record == {"status": "the process ended with -6: LLVM ERROR: Cannot select"}
    assert "h100 local module: so far" in capsys.readouterr().err


def test_a_process_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "exec sleep 60"))
    assert targets._Processes(timeout=0.2).run(aot.Job("h100", "local")) == {"status": "stopped after 0 s"}


def test_processes_end_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "echo '{}'; exec sleep 60"))
    processes = targets._Processes(timeout=60)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(processes.run, aot.Job("h100", "local"))
        while not processes.running:
            time.sleep(0.01)
        processes.close()
        assert running.result(timeout=30)["status"].startswith("the process ended with -9")
    assert processes.run(aot.Job("h100", "local")) == {"status": "stopped"}


def test_a_command_that_is_told_to_stop_takes_its_processes_with_it(tmp_path):
    """Of which one is compiling, as far as it knows, when the signal arrives."""
    sleeper = interpreter(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    script = (
        "import sys; from eval import targets, vendors; from train import cli; "
        "vendors.obstacle = lambda family: None; "
        f"sys.executable = {sleeper!r}; cli.run(targets.main, sys.argv[1:])"
    )
    argv = ["--targets", "h100", "--mechanisms", "local", "--output", str(tmp_path / "targets.md")]
    with subprocess.Popen(
        [sys.executable, "-c", script, *argv], cwd=targets.ROOT, stderr=subprocess.PIPE
    ) as command:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.05)
        command.terminate()
        _, error = command.communicate(timeout=30)
    assert command.returncode == 128 + signal.SIGTERM and b"stopped: what is compiled is recorded" in error
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# The gate.

KERNEL = {"registers": 128, "spill_bytes": 0, "serialised": 0, "shared_memory": 1000}


def entry(kernels, **changes):
    programs = [{"pass": PASSES[0], "length": 64, "status": "ok", "temp_bytes": 1, "kernels": kernels}]
    fields = {"target": "h100", "mechanism": "local", "kind": "module", "lengths": [64, 128]}
    return (
        fields
        | {"versions": {"jax": "1.0"}, "code": "0", "date": "", "memory": "L", "programs": programs}
        | changes
    )


def test_a_kernel_is_the_largest_of_all_programs():
    """Those of several lengths, of which each needs most of something."""
    first, second = KERNEL | {"instructions": {"HGMMA": 8}}, KERNEL | {"registers": 96, "shared_memory": 2000}
    programs = [{"kernels": {"a": first}}, {"kernels": {}}, {"kernels": {"a": second, "b": KERNEL}}]
    assert target_report.merged_kernels({"programs": programs}) == {
        "a": {**KERNEL, "instructions": {"HGMMA": 8}, "shared_memory": 2000},
        "b": KERNEL,
    }


def test_wider_heads_have_rows_of_their_own():
    text = target_report._kernels({kind: entry({"a": KERNEL}, kind=kind) for kind in ("module", "wide")})
    for width in (64, 128):
        assert re.search(rf"\| h100 +\| `a` +\| {width} ", text)


def test_the_gate_accepts_what_is_no_worse():
    better = KERNEL | {"registers": 96}
    assert targets.worse({"scan_forward": KERNEL}, {"scan_forward": KERNEL}, H100) == []
    assert targets.worse({"scan_forward": KERNEL}, {"scan_forward": better}, H100) == []


@pytest.mark.parametrize(
    "recorded, found, complaint",
    [
        ({"scan_forward": KERNEL}, {}, "scan_forward is missing"),
        ({}, {"scan_forward": KERNEL}, "scan_forward is not recorded"),
        ({}, {}, "no kernel is recorded"),
        ({"a": KERNEL}, {"a": KERNEL | {"registers": 129}}, "a: registers 129, recorded 128"),
        ({"a": KERNEL}, {"a": KERNEL | {"spill_bytes": 4}}, "a: spill_bytes 4, recorded 0"),
        ({"a": KERNEL}, {"a": KERNEL | {"serialised": 1}}, "a: serialised 1, recorded 0"),
        ({"a": KERNEL}, {"a": KERNEL | {"shared_memory": 1001}}, "a: shared_memory 1001, recorded 1000"),
        ({"a": KERNEL}, {"a": {"calls": 1}}, "a: registers is unknown"),
        (
            {"a": KERNEL | {"shared_memory": 300_000}},
            {"a": KERNEL | {"shared_memory": 300_000}},
            "more than h100 has, 231424",
        ),
    ],
)
def test_the_gate_complains(recorded, found, complaint):
    assert any(complaint in line for line in targets.worse(recorded, found, H100))


def test_the_gate_cannot_pass_on_nothing(installed, tmp_path, capsys):
    for recorded in (entry({}), entry({"scan_forward": KERNEL}, versions={"jax": "0.9"})):
        (tmp_path / "targets.json").write_text(json.dumps({"h100 local module": recorded}))
        code, _, error = compile_two(capsys, tmp_path, "--check")
        assert code == 1 and "holds no kernels compiled by JAX 1.0" in error
    assert installed.started == []


def test_the_gate_compiles_what_is_recorded_at_its_shortest_length(installed, tmp_path, capsys):
    (tmp_path / "targets.json").write_text(json.dumps({"h100 local module": entry({"scan_forward": KERNEL})}))
    asked_for = []
    installed.result = lambda job: asked_for.append(job.lengths) or entry({"scan_forward": KERNEL})
    code, out, _ = compile_two(capsys, tmp_path, "--check")
    assert code == 0 and "1 kernels of 1 mechanisms" in out and asked_for == [(64,)]
    installed.result = lambda job: entry({"scan_forward": KERNEL | {"registers": 255}})
    code, _, error = compile_two(capsys, tmp_path, "--check")
    assert code == 1 and "registers 255, recorded 128" in error


# The bound from below.


def test_the_work_of_standard_attention_is_its_formula():
    length, heads, width = 1000, 8, 64
    found = work.of("standard", length, heads, width)
    pairs, array = heads * length**2, 2 * length * heads * width
    assert found[PASSES[0]] == work.Work(4 * width * pairs, pairs, 4 * array + 4 * heads * length)
    assert found[PASSES[1]] == work.Work(14 * width * pairs, 2 * pairs, 12 * array + 8 * heads * length)


@pytest.mark.parametrize("mechanism", work._FORMULAS)
def test_work_grows_as_the_mechanism_claims(mechanism):
    short, long = (work.of(mechanism, n, 8, 64)[PASSES[1]] for n in (2**16, 2**18))
    assert long.bytes == 4 * short.bytes
    claim = attn_jax.MECHANISMS[mechanism].time
    # A memory of the sequence's own length, and timescales that forget nothing, are quadratic.
    quadratic = "L^2" in claim or claim in ("L M", "T L reach")
    if short.flops:
        assert round(long.flops / short.flops, 1) == (16 if quadratic else 4)


def test_the_work_of_every_mechanism_of_ours_is_known():
    ours = [n for n, m in attn_jax.MECHANISMS.items() if m.module.__module__.startswith("attn_jax.")]
    assert set(work._FORMULAS) == set(ours)
    assert work.of("something else", 1, 1, 1) is None


# Compilers.

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from eval import aot, vendors
from pallas_kernels import hardware, launch

def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2

def run(x):
    out = jax.ShapeDtypeStruct((128,), jnp.float32)
    cost = launch.Cost(flops=128, exponentials=3, bytes=1024)
    return launch.launch(
        double, x, name="double", out=out, grid={"i": 1}, scratch=[], hardware=hardware.detect(), cost=cost
    )

device = vendors.TARGETS["a100"].topology().devices[0]
with aot.dumped() as folder, jax.default_device(device):
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    compiled = jax.jit(run).lower(x).compile()
    print(device.compute_capability, json.dumps(aot.kernels(compiled.as_text(), folder)))
"""


def said(script):
    """By a process of its own, in which compilers may do as they like."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=targets.ROOT, env=targets.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs["CUDA"]
def test_a_kernel_is_compiled_and_found():
    capability, found = said(SCRIPT).split(maxsplit=1)
    (kernel,) = json.loads(found).values()
    assert capability == "8.0" and list(json.loads(found)) == ["double"]
    assert 0 < kernel["registers"] < 64 and kernel["spill_bytes"] == kernel["shared_memory"] == 0
    claimed = [kernel[quantity] for quantity in ("calls", "flops", "exponentials", "bytes")]
    assert claimed in ([1, 128, 3, 1024], [1, 0, 0, 0])  # JAX passes them on since 0.12


LONG = """
import jax, jax.numpy as jnp
from attn_jax.ops import dual_kv_attention
from eval import vendors

def run(arrays, g):
    return jax.vjp(dual_kv_attention, *arrays)[1](g)

device = vendors.TARGETS["h100"].topology().devices[0]
x = jax.ShapeDtypeStruct((1, 262_144, 8, 64), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
with jax.default_device(device):
    print(jax.jit(run).lower([x] * 5, x).compile().memory_analysis().temp_size_in_bytes)
"""


@needs["CUDA"]
def test_dual_kv_with_its_gradient_needs_little_memory():
    """For 262,144 tokens: the output, which the gradient needs, 268 MB, and a few numbers per token and head."""
    assert int(said(LONG)) < 300e6


def compiled(tmp_path_factory, target, mechanism, lengths):
    output = tmp_path_factory.mktemp(target) / "targets.md"
    argv = ["--quick", "--targets", target, "--mechanisms", mechanism, "--lengths", lengths, "--jobs", "1"]
    targets.main([*argv, "--output", str(output)])
    return json.loads(output.with_suffix(".json").read_text()), output.read_text()


@pytest.fixture(scope="module")
def on_h100(tmp_path_factory):
    """Without XLA's search for the fastest products outside of kernels, nearly half of the time."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", flags)
        return compiled(tmp_path_factory, "h100", "standard", "1024,4096")


def temporary(entries, key):
    programs = [p for p in entries[key]["programs"] if p["pass"] == PASSES[1]]
    return {p["length"]: p["temp_bytes"] for p in programs}


@needs["CUDA"]
def test_attention_compiles_for_a_gpu_in_linear_memory(on_h100):
    entries, text = on_h100
    assert [p["pass"] for p in entries["h100 standard module"]["programs"]] == [PASSES[0], PASSES[1], PASSES[1]]
    ours, dense = temporary(entries, "h100 standard module"), temporary(entries, "h100 standard dense")
    assert ours[4096] <= 4 * ours[1024]
    assert dense[4096] >= 10 * dense[1024]
    assert re.search(r"\| `standard` +\| (XLA|\d+ fused)", text)


@needs["CUDA"]
def test_the_kernels_of_attention_are_as_recorded(on_h100):
    """Renew docs/targets.json with `python -m eval.targets`."""
    path = targets.DOCUMENT.with_suffix(".json")
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if not targets.recorded_jobs(recorded, ["h100"], ["standard"]):
        pytest.skip(f"docs/targets.json holds no kernels compiled by JAX {vendors.versions('CUDA')['jax']}")
    key = "h100 standard module"
    known, found = (target_report.merged_kernels(entries[key]) for entries in (recorded, on_h100[0]))
    assert targets.worse(known, found, H100) == []


@needs["TPU"]
def test_a_mechanism_compiles_for_a_tpu(tmp_path_factory):
    entries, _ = compiled(tmp_path_factory, "v5e", "local", "128")
    assert [p["status"] for p in entries["v5e local module"]["programs"]] == ["ok", "ok"]
