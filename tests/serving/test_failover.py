"""However a stage's worker fails, its streams go on with the same tokens, or end with a reason."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from breaking_worker import CRASH, HANG, REFUSE
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import StageFailed
from cordee.generation.request import Grammar, SamplingParams
from cordee.generation.suspects import LOSSES_MAX
from cordee.models.store import Store
from cordee.worker import process
from streams import GREEDY, SECONDS, Model, ask, ask_all, kill, kill_at, request, tiny_model, until

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
CAREFUL = SamplingParams(
    temperature=0.0, top_logprobs=0, logit_bias={CRASH: -100.0, REFUSE: -100.0, HANG: -100.0}
)
SEEDED = SamplingParams(temperature=0.8, seed=5, top_logprobs=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that break at certain tokens."""
    paths = [str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-m", "breaking_worker"))


@pytest.mark.long
def test_twenty_kills_in_a_row_change_no_stream(starter_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    model = Model(store, store.add_file(starter_path, "starter"))
    vocabulary = Vocabulary(model.stored.path)
    chance = random.Random(20)
    asked = [
        request(f"s{n}", vocabulary.tokenize(f"Chapter {n}. The rope between us", add_bos=True), 20)
        for n in range(20)
    ]

    async def run() -> None:
        async with model.serve(3, context=128, threads=None) as service:
            undisturbed = await ask_all(service, asked)

            killed: set[int] = set()

            async def disturbed(index: int) -> None:
                token = chance.randrange(1, len(undisturbed[index].tokens) - 1)
                killer = kill_at(service, token, chance.randrange(3), killed)
                assert await ask(service, asked[index], killer) == undisturbed[index]

            for wave in range(0, 20, 4):
                await asyncio.gather(*(disturbed(index) for index in range(wave, wave + 4)))
            assert len(killed) == 20
            assert sum(stage["restarts"] for stage in service.status()["stages"]) == 20

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_any_stage_at_any_moment(model: Model, sampling: SamplingParams) -> None:
    asked = [request(f"s{n}", 20 + 7 * n, 60, sampling) for n in range(4)]

    async def run() -> None:
        async with model.serve(3) as service:
            undisturbed = await ask_all(service, asked)
            for stages in ([0], [1], [2], [0, 1, 2], [0, 2]):
                tasks = [asyncio.create_task(ask(service, each)) for each in asked]
                await asyncio.sleep(0.05)
                for stage in stages:
                    assert kill(service, stage)
                assert await asyncio.gather(*tasks) == undisturbed, f"killed {stages}"

    asyncio.run(run())


@pytest.mark.long
def test_a_kill_during_prefill_and_during_replays(model: Model) -> None:
    asked = [request(f"s{stage}", 1200 + stage, 10) for stage in range(3)]

    async def run() -> None:
        async with model.serve(
            3, context=1300, sequences=1
        ) as service:  # one slot: no prompt is found cached
            undisturbed = [await ask(service, each) for each in asked]
            for stage in range(3):
                task = asyncio.create_task(ask(service, asked[stage]))
                await until(lambda: service.status()["active"] == 1)
                for again in range(2 if stage else LOSSES_MAX):  # the later ones in the middle of the replay
                    assert kill(service, (stage + again) % 3)
                    await until(lambda: not service.ready)
                    await until(lambda: service.ready)
                assert not task.done()
                assert await task == undisturbed[stage]

    asyncio.run(run())


def test_a_stream_bound_to_a_schema_goes_on_within_it(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    bound = SamplingParams(
        temperature=1.0, seed=3, top_logprobs=0, grammar=Grammar("json_schema", json.dumps(schema))
    )
    asked = request("json", 20, 200, bound)

    async def run() -> None:
        async with model.serve(3) as service:
            undisturbed = await ask(service, asked)
            assert json.loads(undisturbed.text).keys() == {"name", "age"}
            length = len(undisturbed.tokens)
            for token in (1, length // 2, length - 2):
                assert await ask(service, asked, kill_at(service, token, 2)) == undisturbed
            # The answer may have ended with the tokens that had come when its stage was killed.
            await until(lambda: service.status()["stages"][2]["restarts"] == 3)

    asyncio.run(run())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stopped_worker_is_replaced(model: Model, stage: int) -> None:
    asked = [request(f"s{n}", 20 + n, 60) for n in range(3)]

    async def run() -> None:
        async with model.serve(3) as service:
            undisturbed = await ask_all(service, asked)
            tasks = [asyncio.create_task(ask(service, each)) for each in asked]
            await asyncio.sleep(0.03)
            assert kill(service, stage, signal.SIGSTOP)
            assert await asyncio.gather(*tasks) == undisturbed
            # A stopped neighbour of the dead worker cannot be wired: it is replaced as well.
            task = asyncio.create_task(ask(service, asked[0]))
            await until(lambda: service.status()["active"] == 1)
            kill(service, (stage + 1) % 3, signal.SIGSTOP)
            kill(service, stage)
            assert await task == undisturbed[0]

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_slice_that_is_damaged_fails_its_streams_and_heals(tmp_path: Path, damage: str) -> None:
    model = tiny_model(tmp_path)
    asked = request("a", 20, 100)

    async def run() -> None:
        async with model.serve(3) as service:
            undisturbed = await ask(service, asked)
            first, last = service.status()["stages"][1]["layers"]
            path = model.store.slice_for(model.stored, first, last).path
            data = path.read_bytes()
            path.unlink()  # the running workers keep the file that they mapped
            if damage == "cut short":
                path.write_bytes(data[:-5000])
            tasks = [asyncio.create_task(ask(service, request(f"s{n}", 20 + n, 200))) for n in range(12)]
            await until(lambda: service.status()["active"] == 8)
            kill(service, 1)
            for task in tasks:
                with pytest.raises(StageFailed, match="tiny cannot answer"):
                    await task
            assert service.status()["state"] == "failed"
            with pytest.raises(StageFailed, match="tiny cannot answer"):
                await ask(service, asked)
            path.write_bytes(data)
            await until(lambda: service.ready)
            assert await ask(service, asked) == undisturbed

    asyncio.run(run())


@pytest.mark.parametrize("fault", [CRASH, REFUSE])
@pytest.mark.usefixtures("breaking")
def test_a_stream_that_breaks_its_stage_each_time_ends_and_the_others_go_on(model: Model, fault: int) -> None:
    asked = [request(f"s{n}", 20 + n, 150, CAREFUL) for n in range(3)]
    late = [request(f"late{n}", 30 + n, 20, CAREFUL) for n in range(3)]

    async def run() -> None:
        async with model.serve(sequences=4) as service:
            undisturbed = await ask_all(service, [*asked, *late])
            tasks = [asyncio.create_task(ask(service, each)) for each in asked]
            await until(lambda: service.status()["active"] == 3)
            culprit = asyncio.create_task(ask(service, request("culprit", [5] * 40 + [fault])))
            tasks += [asyncio.create_task(ask(service, each)) for each in late]
            with pytest.raises(StageFailed, match="again and again"):
                await culprit
            assert await asyncio.gather(*tasks) == undisturbed
            assert service.status()["stages"][0]["restarts"] == LOSSES_MAX + 1

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.usefixtures("breaking")
def test_a_worker_that_does_not_come_back_is_replaced(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cordee.generation.results.RESULT_SECONDS_MAX", 1.0)

    async def run() -> None:
        async with model.serve() as service:
            with pytest.raises(StageFailed, match="again and again"):
                await ask(service, request("hang", [5, HANG]))
            assert await ask(service, request("a", 20, 32, CAREFUL))

    asyncio.run(run())


@pytest.mark.usefixtures("breaking")
def test_a_worker_ends_in_the_middle_of_a_decode_when_its_service_closes(model: Model) -> None:
    async def run() -> int:
        async with model.serve() as service:
            task = asyncio.create_task(ask(service, request("hang", [5, HANG])))
            await until(lambda: service.status()["active"] == 1)
            pid = service.status()["stages"][0]["pid"]
            await asyncio.sleep(0.1)
        with pytest.raises(StageFailed, match="closed"):
            await task
        return pid

    assert not psutil.pid_exists(asyncio.run(run()))


PARENT = """
import asyncio, sys
from pathlib import Path
from streams import ask, request, tiny_model

async def run():
    async with tiny_model(Path(sys.argv[1])).serve(int(sys.argv[2])) as service:
        print(*(stage["pid"] for stage in service.status()["stages"]), flush=True)
        await ask(service, request("endless", [5, int(sys.argv[3])], 200))
        await asyncio.sleep(3600)

asyncio.run(run())
"""


@pytest.mark.parametrize(("stages", "token"), [(3, 6), (1, HANG)], ids=["idle", "in mid-decode"])
def test_no_worker_outlives_its_service(
    tmp_path_factory: pytest.TempPathFactory, breaking: None, stages: int, token: int
) -> None:
    script = PARENT
    if token == HANG:
        script = "import sys\nfrom cordee.worker import process\n" + (
            'process.COMMAND = (sys.executable, "-m", "breaking_worker")\n' + PARENT
        )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path_factory.mktemp("m")), str(stages), str(token)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("t"))},  # what a killed service leaves
        text=True,
    ) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == stages
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=SECONDS)
    assert not alive


def test_sockets_of_a_killed_process_are_removed_by_the_next(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(short_path))
    script = "from cordee.worker.process import Workers; own = Workers(); print(own.folder); input()"
    killed = subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        env={**os.environ, "TMPDIR": str(short_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    left = Path(killed.stdout.readline().strip())
    first = process.Workers()
    assert left.parent == short_path and left.exists()  # its owner still runs
    killed.kill()
    killed.wait()
    second = process.Workers()
    assert not left.exists() and first.folder.exists()
    first.close()
    second.close()
    assert not list(short_path.iterdir())


def test_a_report_that_raises_does_not_stop_the_replacing(model: Model) -> None:
    async def run() -> None:
        lines: list[str] = []

        def report(line: str) -> None:
            lines.append(line)
            if "ended" in line:
                raise BrokenPipeError("nobody reads the reports any more")

        async with model.serve(3, report) as service:
            undisturbed = await ask(service, request("a", 20, 60))
            task = asyncio.create_task(ask(service, request("a", 20, 60)))
            await asyncio.sleep(0.02)
            kill(service, 0)
            assert await task == undisturbed
            assert any("ended with status -9" in line for line in lines)

    asyncio.run(run())
