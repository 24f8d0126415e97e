"""Runs of the commands in this process, and the state in which they ended."""

import contextlib
import io
import os
import signal

import jax
import numpy as np
import pytest

from train import cli, loop, sharding, tasks
from train.checkpoints import Checkpoints


def outcome(main, *argv):
    """Exit code, standard output and standard error of the command `main` with `argv`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        cli.run(main, [str(argument) for argument in argv])
    return exit.value.code, out.getvalue(), err.getvalue()


class Stopping:
    """A data iterator that sends SIGTERM to this process as batch `at`, counted from 1, is fetched."""

    def __init__(self, iterator, at):
        self.iterator, self.remaining = iterator, at
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self):
        self.remaining -= 1
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.iterator)


def one_program(monkeypatch):
    """All runs from here on are of one config: what they train is traced and compiled for the first alone."""

    def once(build):
        built = []

        def call(*arguments):
            if not built:
                built.append(build(*arguments))
            return built[0]

        return call

    for owner, name in ((loop.Program, "of"), (loop, "make_eval_step")):
        monkeypatch.setattr(owner, name, once(getattr(owner, name)))


def final_state(config, workdir):
    """The task, and the arrays, progress and data position of the last checkpoint."""
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        checkpoints = Checkpoints(workdir)
        restored = checkpoints.restore_last(loop.Program.of(config, task, mesh).abstract)
        checkpoints.close()
    assert restored is not None
    return task, *restored


def assert_bit_equal(ours, theirs, message=""):
    """Fails unless two trees of arrays and random keys are the same to the bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    expected = dict(jax.tree_util.tree_leaves_with_path(theirs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        pair = (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (leaf, expected[path])
        )
        np.testing.assert_array_equal(*map(np.asarray, pair), err_msg=f"{path} {message}")
