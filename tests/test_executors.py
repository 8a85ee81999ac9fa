"""Where jobs run makes no difference: this process, a Ray cluster that loses a node, the processes of torchrun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import stepmask
from cluster_jobs import end, host, power
from stepmask import Budget, LocalExecutor, MaskSchedule, RayExecutor, Trajectory
from stepmask.cli import app
from stepmask.denoiser.identity import digest, weights_digest
from stepmask.denoiser.trajectory import recorded
from stepmask.errors import ClusterError, InvalidBudget, InvalidRunFolder, LearningError
from stepmask.evaluation.shards import write_shards
from stepmask.executors.filed import Kind, claim, finish, keep
from stepmask.executors.processes import ProcessesExecutor
from stepmask.files import DAY, _place, write_together
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts

from test_schedule import forecasting
from toys import Drift, tiny_pipe

CHEAP = TrainedForecasts(passes=1)
QUICK = PerTimestep(iterations=2, rounds=2)


POWERS = Kind[int, int]("powers", power, lambda exponent: f"{exponent}.json", json.dumps, json.loads)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers must find this file's functions
    ray.init(nodes.address, log_to_driver=False, runtime_env=here)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def ray_executor(cluster: Any) -> RayExecutor:
    return RayExecutor()


class TestFolder:
    def test_only_what_is_missing_is_done_again(self, tmp_path: Path) -> None:
        assert finish(POWERS, 2, [3, 5], LocalExecutor(), tmp_path) == [8, 32]
        keep(tmp_path / "3.json", "-1")  # whoever reads it did not do it again
        assert finish(POWERS, 2, [5, 3, 4], LocalExecutor(), tmp_path) == [32, -1, 16]
        assert finish(POWERS, 2, [3], LocalExecutor(), None) == [8]

    def test_what_was_done_before_an_error_is_kept(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidBudget, match="thirteen"):
            finish(POWERS, 2, [1, 13, 2], LocalExecutor(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["1.json"]

    def test_a_damaged_file_is_one_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / "3.json").write_text("{")
        with pytest.raises(InvalidRunFolder, match=r"3\.json.*Delete it"):
            finish(POWERS, 2, [3], LocalExecutor(), tmp_path)

    def test_a_file_without_a_checksum_is_told_apart_from_a_changed_one(self, tmp_path: Path) -> None:
        (tmp_path / "3.json").write_text("8")  # as a version before checksums wrote it
        with pytest.raises(InvalidRunFolder, match=r"version before checksums.*Delete it"):
            finish(POWERS, 2, [3], LocalExecutor(), tmp_path)
        keep(tmp_path / "3.json", "8")
        whole = (tmp_path / "3.json").read_bytes()
        for at in range(len(whole)):
            (tmp_path / "3.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(InvalidRunFolder, match=r"3\.json"):
                finish(POWERS, 2, [3], LocalExecutor(), tmp_path)
            (tmp_path / "3.json").write_bytes(whole[:at])
            with pytest.raises(InvalidRunFolder, match=r"3\.json"):
                finish(POWERS, 2, [3], LocalExecutor(), tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, "\udc80"])
    def test_a_damaged_manifest_is_one_clear_error(self, tmp_path: Path, text: str) -> None:
        claim(tmp_path, {"a": 1})
        (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InvalidRunFolder, match=r"manifest\.json, which cannot be read"):
            claim(tmp_path, {"a": 1})

    @pytest.mark.parametrize(
        ("work", "kinds"),
        [("learned", {"sweep", "times", "training", "trial"}), ("evaluated", {"batch"})],
    )
    def test_all_that_is_kept_is_checked(self, tmp_path: Path, work: str, kinds: set[str]) -> None:
        do = {"learned": learned, "evaluated": evaluated}[work]
        do(tmp_path / "whole")
        names = {path.name.partition("-")[0]: path.name for path in sorted((tmp_path / "whole").iterdir())}
        assert names.keys() == {*kinds, "manifest.json"}
        for kind in kinds:
            content = (tmp_path / "whole" / names[kind]).read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            for number, damaged in enumerate((changed, content[:middle])):
                folder = shutil.copytree(tmp_path / "whole", tmp_path / f"{kind}{number}")
                (folder / names[kind]).write_bytes(damaged)
                with pytest.raises(InvalidRunFolder, match=f"{names[kind]}, which cannot be read"):
                    do(folder)

    def test_a_folder_belongs_to_one_run(self, tmp_path: Path) -> None:
        claim(tmp_path, {"a": 1, "b": (2, 3)})
        claim(tmp_path, {"b": [2, 3], "a": 1})
        with pytest.raises(InvalidRunFolder, match="another run: a, c differ"):
            claim(tmp_path, {"a": 2, "b": [2, 3], "c": 4})

    def test_other_weights_are_refused_wherever_a_folder_is_kept(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule, tmp_path: Path
    ) -> None:
        stepmask.sweep(pipe, trajectory, probes=1, folder=tmp_path)
        with torch.no_grad():
            pipe.transformer.proj_out_2.bias += 1
        again = stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=5)
        with pytest.raises(InvalidRunFolder, match="weights differ"):
            stepmask.sweep(pipe, again, folder=tmp_path)
        with pytest.raises(InvalidRunFolder, match="weights differ"):
            stepmask.learn(pipe, again, folder=tmp_path)
        with pytest.raises(InvalidRunFolder, match="weights differ"):
            stepmask.evaluate(pipe, reference, folder=tmp_path, class_labels=[1], num_inference_steps=5)

    def test_equal_values_have_equal_names_and_others_have_others(self) -> None:
        values: list[Any] = [1, 1.0, "1", None, True, [1], {"a": 1}, torch.ones(2), torch.ones(2, 1), np.ones(2)]
        names = [digest(value) for value in values]
        assert names == [digest(value) for value in values]
        assert len(set(names)) == len(names)
        with pytest.raises(InvalidRunFolder, match="a object among"):
            digest([1, object()])

    def test_weights_have_a_name(self) -> None:
        layer = nn.Linear(2, 2)
        before = weights_digest(layer)
        assert before == weights_digest(layer)
        with torch.no_grad():
            layer.bias[1] += 1e-6
        assert weights_digest(layer) != before


def learned(folder: Path) -> None:
    """Learn for a budget in time, all of it kept in a folder: the same whenever it is done."""
    torch.manual_seed(0)
    network = Drift()

    def run() -> torch.Tensor:
        x = torch.ones(1, 2)
        for step in range(4):
            x = x - 0.1 * network(x, step / 4)
        return x

    trajectory = stepmask.record(network, run=run)
    graph = stepmask.trace(network, trajectory, blocks="[sm]*")
    stepmask.learn(network, trajectory, Budget(time=0.9), graph=graph, learner=CHEAP, folder=folder)


def evaluated(folder: Path) -> None:
    """Measure the reference against itself, kept in a folder."""
    pipe, run = tiny_pipe(), {"class_labels": [1], "num_inference_steps": 2}
    trajectory = stepmask.record(pipe, **run)
    table = MaskSchedule.all_compute(stepmask.trace(pipe, trajectory), trajectory.denoiser, trajectory.sampler)
    stepmask.evaluate(pipe, table, folder=folder, repeats=1, **run)


class TestLeftovers:
    """What a process that was killed while it wrote has left is removed; what others write stays."""

    def test_of_a_killed_process(self, tmp_path: Path) -> None:
        killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.read_bytes() == b"half"
        assert finish(POWERS, 2, [3], LocalExecutor(), tmp_path) == [8]
        assert [path.name for path in tmp_path.iterdir()] == ["3.json"]

    @pytest.mark.parametrize("use", ["claim", "finish", "save"])
    def test_wherever_a_folder_is_used_again(self, tmp_path: Path, use: str) -> None:
        for name in ("dead", "living", "elsewhere", "old", "mine"):
            (tmp_path / self.named(name)).touch()
        os.utime(tmp_path / self.named("old"), (0, time.time() - 2 * DAY))
        match use:
            case "claim":
                claim(tmp_path, {"a": 1})
            case "finish":
                finish(POWERS, 2, [3], LocalExecutor(), tmp_path)
            case "save":
                forecasting().save_pretrained(tmp_path)
        hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
        assert hidden == {self.named("living"), self.named("elsewhere"), self.named("mine")}

    def named(self, whose: str) -> str:
        """The name of somebody's temporary."""
        process = {"living": os.getppid(), "dead": 999_999_999}.get(whose, 1)
        places = {"elsewhere": "0" * 8, "old": "0" * 7 + "1"}
        return ".mine" if whose == "mine" else f".stepmask-{places.get(whose, _place())}-{process}-{'0' * 16}"

    def test_what_has_a_name_was_on_the_disk_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        happened: list[str] = []
        sync, rename = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda handle: (happened.append(f"{os.fstat(handle).st_size}"), sync(handle)))
        monkeypatch.setattr(os, "replace", lambda old, new: (happened.append(Path(new).name), rename(old, new)))
        write_together({tmp_path / "a": b"four", tmp_path / "b": "three"})
        assert happened == ["4", "5", "a", "b"]
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o644


KILLED_WHILE_WRITING = """
import os
import shutil
import signal
import sys
from pathlib import Path

from stepmask.files import write_whole

os.replace = lambda old, new: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]) / "3.json", b"half")
"""


class TestSweepInParts:
    def test_a_sweep_in_parts_is_the_sweep(self, pipe: Any, trajectory: Trajectory, tmp_path: Path) -> None:
        whole = stepmask.sweep(pipe, trajectory, probes=3)
        parts = stepmask.sweep(pipe, trajectory, probes=3, executor=LocalExecutor(workers=2), folder=tmp_path)
        assert len(list(tmp_path.glob("sweep-*"))) == 2
        for name in ("inner", "held", "offset", "samples"):
            assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
        measured = {"measured_bytes"}
        assert {k: v for k, v in parts.provenance.items() if k not in measured} == {
            k: v for k, v in whole.provenance.items() if k not in measured
        }

    def test_several_trajectories_are_swept_as_if_merged(self, pipe: Any, trajectory: Trajectory) -> None:
        other = stepmask.record(pipe, seed=1, class_labels=[3, 4], num_inference_steps=5)
        both = stepmask.sweep(pipe, [trajectory, other], probes=1)
        merged = stepmask.sweep(pipe, trajectory, probes=1) + stepmask.sweep(pipe, other, probes=1)
        assert np.array_equal(both.inner, merged.inner)
        assert both.samples.tolist() == [0, 1, 2, 3]

    def test_what_a_function_decodes_is_not_kept(self, pipe: Any, trajectory: Trajectory, tmp_path: Path) -> None:
        with pytest.raises(LearningError, match="a function that decodes"):
            stepmask.sweep(pipe, trajectory, decode=torch.sin, folder=tmp_path)
        assert not list(tmp_path.iterdir())


def same(a: stepmask.Report, b: stepmask.Report) -> bool:
    """All that two reports say of samples, not of times."""
    names = ("name", "evaluations", "macs_executed", "latent_errors", "psnr_db", "ssim", "path_errors", "store_bytes")
    return [[getattr(row, name) for name in names] for row in a.rows] == [
        [getattr(row, name) for name in names] for row in b.rows
    ]


class TestShards:
    def test_tar_files_hold_what_the_pipeline_draws(self, pipe: Any, reference: MaskSchedule, tmp_path: Path) -> None:
        calls = {seed: {"class_labels": [seed, 2], "num_inference_steps": 5} for seed in (3, 4)}
        paths = write_shards(pipe, calls, tmp_path, schedule=reference)
        drawn = pipe(**calls[4], generator=torch.Generator().manual_seed(4)).images
        with tarfile.open(paths[1]) as archive:
            assert archive.getnames() == [f"00000004-000{index}.{kind}" for index in (0, 1) for kind in ("png", "json")]
            archive.extractall(tmp_path, filter="data")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "00000004-0001.png")), np.asarray(drawn[1]))
        told = json.loads((tmp_path / "00000004-0000.json").read_text())
        assert told == {"seed": 4, "class_labels": 4, "num_inference_steps": 5}

    def test_what_is_there_is_not_drawn_again_and_ends_the_same(self, pipe: Any, tmp_path: Path) -> None:
        calls = {seed: {"class_labels": [1], "num_inference_steps": 2} for seed in range(3)}
        paths = write_shards(pipe, calls, tmp_path / "whole")
        (again,) = write_shards(pipe, {1: calls[1]}, tmp_path / "parts")
        again.write_bytes(b"mine")
        parts = write_shards(pipe, calls, tmp_path / "parts")
        assert [path.read_bytes() for path in parts] == [
            paths[0].read_bytes(), b"mine", paths[2].read_bytes(),
        ]  # fmt: skip

    def test_a_folder_of_other_samples_is_refused(self, pipe: Any, reference: MaskSchedule, tmp_path: Path) -> None:
        calls = {0: {"class_labels": [1], "num_inference_steps": 5}}
        write_shards(pipe, calls, tmp_path)
        with pytest.raises(InvalidRunFolder, match="schedule differ"):
            write_shards(pipe, calls, tmp_path, schedule=reference)


class TestRay:
    def test_results_errors_and_workers(self, ray_executor: RayExecutor) -> None:
        executor = ray_executor
        assert executor.workers == 3
        shared = executor.share(2)
        assert finish(POWERS, shared, [5, 3, 4], executor, None) == [32, 8, 16]
        assert finish(POWERS, shared, [], executor, None) == []
        with pytest.raises(InvalidBudget, match="thirteen"):
            finish(POWERS, shared, [13], executor, None)
        with pytest.raises(ClusterError, match="room for a worker with 2 CPUs"):
            assert RayExecutor(num_cpus=2, num_gpus=1).workers
        with pytest.raises(ClusterError, match="cannot be pickled"):
            executor.share(iter([]) and (each for each in []))

    def test_the_default_learner_learns_the_same(self, ray_executor: RayExecutor, pipe: Any, tmp_path: Path) -> None:
        calls = {seed: {"class_labels": [seed, 2], "num_inference_steps": 5} for seed in range(3)}
        here = stepmask.learn(pipe, recorded(pipe, calls), 0.6, learner=CHEAP)
        runs = recorded(pipe, calls, executor=ray_executor)
        there = stepmask.learn(pipe, runs, 0.6, learner=CHEAP, executor=ray_executor, folder=tmp_path)
        assert np.array_equal(there.rows, here.rows)
        assert np.allclose(there.forecasts, here.forecasts, atol=1e-6)

    def test_rows_and_the_report_are_the_same(
        self, ray_executor: RayExecutor, pipe: Any, trajectory: Trajectory
    ) -> None:
        here = stepmask.learn(pipe, trajectory, 0.6, learner=QUICK)
        there = stepmask.learn(pipe, trajectory, 0.6, learner=QUICK, executor=ray_executor)
        assert there == here
        call: dict[str, Any] = {"class_labels": [3, 4], "num_inference_steps": 5, "repeats": 1, "seed": [7, 8, 9]}
        reports = [stepmask.evaluate(pipe, here, executor=each, **call) for each in (LocalExecutor(), ray_executor)]
        assert same(*reports)
        assert len(reports[0]["schedule"].psnr_db) == 6

    def test_a_node_that_dies_takes_no_job_with_it(
        self, cluster: Any, ray_executor: RayExecutor, tmp_path: Path
    ) -> None:
        jobs = [tmp_path / f"slow{number}" for number in range(5)]

        def pull_the_plug() -> None:
            while len(list(tmp_path.iterdir())) < 3:
                time.sleep(0.05)
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

        accident = Thread(target=pull_the_plug)
        accident.start()
        done = dict(ray_executor.map(host, ray_executor.share(None), jobs, title="waiting"))
        accident.join()
        assert sorted(done) == list(range(5))
        begun = [len(list(tmp_path.glob(f"slow{number}.*"))) for number in range(5)]
        assert sorted(begun) == [1, 1, 1, 1, 2]  # what ran there began a second time elsewhere

    def test_a_job_that_kills_its_worker_is_given_up(self, ray_executor: RayExecutor) -> None:
        executor = ray_executor
        with pytest.raises(ClusterError, match="4 workers died of"):
            list(executor.map(end, executor.share(None), [0], title="dying"))


def torchrun(*arguments: str) -> list[str]:
    """A command line of two processes that meet on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def learning(pipe: Path, out: Path) -> list[str]:
    """Arguments of a small learning run."""
    told = ["learn", str(pipe), "--steps", "3", "--samples", "1", "--batches", "2", "--budget", "0.6"]
    return ["-m", "stepmask", "--quiet", *told, "--out", str(out)]


ONE_FAILS = """
import sys

from stepmask.errors import InvalidBudget
from stepmask.executors.processes import ProcessesExecutor
from stepmask.files import DAY, _place, write_together

def work(shared, job):
    if job == 3:
        raise InvalidBudget(given="three", expected="another number", advice="Do not")
    return shared * job

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + chr(10))  # a line at once: both processes write to one pipe

executor = ProcessesExecutor()
say(executor.rank, sorted(executor.map(work, 2, [0, 1, 2], title="fine")), executor.union({executor.rank}))
try:
    say(list(executor.map(work, 2, [0, 1, 2, 3, 4], title="one fails")))
except InvalidBudget:
    say(executor.rank, "knows")
"""


class TestProcesses:
    def test_every_process_gets_all_results_and_all_errors(self, tmp_path: Path) -> None:
        (tmp_path / "one_fails.py").write_text(ONE_FAILS)
        said = subprocess.check_output(torchrun(str(tmp_path / "one_fails.py")), text=True)
        results = "[(0, 0), (1, 2), (2, 4)] {0, 1}"
        assert sorted(said.splitlines()) == [f"0 {results}", "0 knows", f"1 {results}", "1 knows"]

    def test_slurm_is_told_by_its_own_names(self, tmp_path: Path) -> None:
        (tmp_path / "one_fails.py").write_text(ONE_FAILS)
        port = str(free_port())
        told = {**os.environ, "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        tasks = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "one_fails.py")],
                env={**told, "SLURM_PROCID": str(rank)}, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for rank, task in enumerate(tasks):
            assert task.communicate()[0].splitlines()[-1] == f"{rank} knows"

    def test_a_killed_torchrun_goes_on_and_ends_as_one_process_does(
        self, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe.save_pretrained(tmp_path / "pipe")
        learn = partial(learning, tmp_path / "pipe")
        # this process has one thread, as torchrun gives each of its own: sums of more are rounded otherwise
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("TQDM_DISABLE", "")  # so that it is put back after --quiet
        _, _, *told = learn(tmp_path / "one")
        assert CliRunner().invoke(app, told).exit_code == 0
        killed = subprocess.Popen(torchrun(*learn(tmp_path / "two")), start_new_session=True)
        while len(kept := list((tmp_path / "two" / "training").glob("trial-*"))) < 3:
            time.sleep(0.05)
            assert killed.poll() is None
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        written = {path: path.stat().st_mtime_ns for path in kept}
        said = subprocess.check_output(torchrun(*learn(tmp_path / "two")), text=True)
        assert said.count("wrote") == 1  # by one of the processes alone
        one, two = (MaskSchedule.from_pretrained(tmp_path / name) for name in ("one", "two"))
        assert two == one
        assert written == {path: path.stat().st_mtime_ns for path in kept}

    def test_a_process_on_its_own_is_told_so(self) -> None:
        with pytest.raises(ClusterError, match="does not meet others"):
            ProcessesExecutor()
