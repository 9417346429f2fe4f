"""A guide in Markdown as a list of steps, and somebody who follows it: types its commands on hosts of a lab.

Each fenced block of a guide follows a comment that says where it is typed, or why no test can type it.
Readers do not see the comment, and find the machines in bold above it:

    **pc-1, pc-2**
    <!-- on: pc-1 pc-2; OPTION; ... -->      typed on these machines, one after the other

    <!-- not run: REASON -->

and a comment alone tells what happens to a machine beside the keyboard: `<!-- act: stop pc-3 -->` (ACTS).
Options of a block, which otherwise must end well:

    stays              a program that runs on until it is stopped; typed in a terminal of its own
    code               prints an invitation: the word CODE of the blocks that follow
    answers            prints something
    prints: PATTERN    prints this; `A & B` are two patterns
    until: PATTERN     typed again and again, until it prints this
    fails: PATTERN     must fail, and say this
    types: TEXT        types this line when it is asked for something
    needs: PROGRAM     passed over where that program is missing
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from netfaults import fake_clock
from netlab import Host, Lab, Machine

OPTIONS = {"stays", "code", "answers", "prints", "until", "fails", "types", "needs"}
SECONDS = 60.0  # for any block
READY_SECONDS = 30.0  # until a node that was started can be asked
CODE = re.compile(r"\bcordee[a-z2-7]{40,}\b")
HOLIDAYS = "+60d"  # how far clocks are when two months have passed
# Words of a block are typed by this; `sudo` is for readers who are not root.
SHELL = 'unset CORDEE_HOME XDG_DATA_HOME; cd ~; sudo() { "$@"; }; [ ! -f ~/.profile ] || . ~/.profile\n'
IN_SHELL = "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])"


@dataclass(frozen=True)
class Step:
    """A block with its marker, or an act (`text` empty); `line` is where it stands."""

    line: int
    kind: str  # on, not run, act
    target: str
    text: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def machines(self) -> list[str]:
        """On which machines it is typed."""
        return self.target.split()


def steps(markdown: str) -> list[Step]:
    """All steps of a guide, in order.

    Raises:
        ValueError: a block has no marker, or a marker makes no sense; the message has the line.
    """
    found: list[Step] = []
    marker: Step | None = None
    lines = markdown.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("```"):
            if marker is None:
                raise ValueError(f"line {number}: a block without a marker")
            end = lines.index("```", number)
            found.append(
                Step(number, marker.kind, marker.target, "\n".join(lines[number:end]), marker.options)
            )
            number, marker = end + 1, None
        elif line.startswith("<!--"):
            marker = _marker(number, line)
            if marker.kind == "on" and lines[number - 2] != f"**{', '.join(marker.machines)}**":
                raise ValueError(f"line {number}: what is in bold above are not its machines")
            if marker.kind == "act":
                found.append(marker)
                marker = None
        elif line and marker is not None:
            raise ValueError(f"line {number}: a marker and no block")
    return found


def _marker(number: int, line: str) -> Step:
    match = re.fullmatch(r"<!-- (on|not run|act): (.+) -->", line)
    if match is None:
        raise ValueError(f"line {number}: {line} is no marker")
    kind, rest = match.groups()
    if kind != "on":
        return Step(number, kind, rest)
    target, *options = rest.split("; ")
    pairs = {name: value for name, _, value in (option.partition(": ") for option in options)}
    if unknown := pairs.keys() - OPTIONS:
        raise ValueError(f"line {number}: unknown options {unknown}")
    return Step(number, kind, target, options=pairs)


class Office(Lab):
    """PCs with the addresses of the guide."""

    def __init__(self, name: str, machine: Machine, count: int = 4) -> None:
        super().__init__([replace(machine, environment={}) for _ in range(count)], name, "192.168.1", 11)


class Reader:
    """Follows a guide on the machines of an office."""

    def __init__(self, office: Office) -> None:
        self.machines = {f"pc-{number}": host for number, host in enumerate(office.hosts, 1)}
        self.running: dict[str, subprocess.Popen] = {}
        self.code = ""
        self.passed_over: list[str] = []  # programs that are missing here
        self.spread: set[int] = set()  # over how many machines a model was seen serving
        for host in self.machines.values():
            _install(host.home)

    def follow(self, step: Step) -> None:
        """One step.

        Raises:
            AssertionError: it did not do what the guide says.
        """
        if step.kind == "act":
            self._act(*step.target.split(" ", 1))
        elif step.kind == "on":
            needed = step.options.get("needs", "sh")
            if shutil.which(needed) is None:
                self.passed_over.append(needed)
                return
            for name in step.machines:
                self._type(name, step)

    def _type(self, name: str, step: Step) -> None:
        text = re.sub(r"\bCODE\b", self._take_code, step.text)
        if "stays" in step.options:
            self._start(name, text)
            return
        ends = time.monotonic() + SECONDS
        while True:
            status, printed = self.typed(name, text, step.options.get("types", ""))
            where = f"line {step.line}, {name}: {text}\n{printed}"
            if "fails" in step.options:
                assert status != 0, f"it did not fail: {where}"
                assert _has(printed, step.options["fails"]), where
                return
            wanted = step.options.get("until")
            if wanted is None or (status == 0 and _has(printed, wanted)):
                break
            assert time.monotonic() < ends, f"it never said {wanted}: {where}"
            time.sleep(0.5)
        assert status == 0, f"it failed ({status}): {where}"
        assert _has(printed, step.options.get("prints", "")), where
        assert printed.strip() or "answers" not in step.options, where
        if "code" in step.options:
            found = CODE.findall(printed)
            assert len(found) == 1, where
            self.code = found[0]
        if "serving" in step.options.get("until", ""):
            self.spread.add(len(set(re.findall(r"^ +\d+-\d+ +(pc-\d)", printed, re.MULTILINE))))

    def typed(self, name: str, text: str, answer: str = "") -> tuple[int, str]:
        """Type lines on a machine, and the answer to what they ask: exit status, and all that is printed."""
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = self._popen(self.machines[name], text, **streams)
        try:
            printed, _ = child.communicate(f"{answer}\n".encode() if answer else b"", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            printed, _ = child.communicate()
            raise AssertionError(f"{name}: {text} does not end: {printed.decode()}") from None
        return child.returncode, printed.decode()

    def _popen(self, host: Host, text: str, **streams: object) -> subprocess.Popen:
        assert host.home.is_relative_to(host.lab.folder), "rm -rf of a guide is for homes of a lab"
        return host.popen(("-c", IN_SHELL, SHELL + text), {"HOME": str(host.home)}, **streams)

    def _start(self, name: str, text: str) -> None:
        """In a terminal of its own; ready when its node can be asked."""
        assert name not in self.running or self.running[name].poll() is not None, f"{name} runs already"
        host = self.machines[name]
        with host.log.open("ab") as log:
            child = self.running[name] = self._popen(host, text, stdout=log, stderr=log)
        ends = time.monotonic() + READY_SECONDS
        while self.typed(name, "cordee nodes")[0] != 0:
            said = host.log.read_text(errors="replace")[-2000:]
            assert child.poll() is None and time.monotonic() < ends, f"{name}: {text}\n{said}"
            time.sleep(0.2)

    def _take_code(self, _: re.Match) -> str:
        assert self.code, "a CODE that nobody gave, or that was used"
        code, self.code = self.code, ""
        return code

    def _act(self, what: str, which: str) -> None:
        """What happens beside the keyboards."""
        ACTS[what](self, which)

    def stop(self, name: str) -> None:
        """Ctrl-C where its node runs."""
        child = self.running.pop(name)
        os.killpg(child.pid, signal.SIGINT)
        child.wait(SECONDS)

    def cut(self, name: str) -> None:
        """It is carried away: nothing of it is heard any more."""
        self.machines[name].crash()
        self.running.pop(name).wait(SECONDS)

    def lose_disk(self, name: str) -> None:
        """It falls in the middle of everything, and what it had is gone but for a back-up kept elsewhere."""
        self.cut(name)
        shutil.rmtree(self.machines[name].home / ".local")
        self.machines[name].plug()

    def pause(self, _: str) -> None:
        """Everything is switched off for HOLIDAYS."""
        for name in list(self.running):
            self.stop(name)
        for host in self.machines.values():
            host.machine.environment.update(fake_clock(HOLIDAYS))


ACTS = {"stop": Reader.stop, "cut": Reader.cut, "break": Reader.lose_disk, "pause": Reader.pause}


def _has(text: str, patterns: str) -> bool:
    return all(re.search(pattern, text) for pattern in patterns.split(" & "))


def _install(home: Path) -> None:
    """What the steps that are not run leave behind: the program, where clone and set-up put it."""
    program = home / "cordee" / ".venv" / "bin" / "cordee"
    program.parent.mkdir(parents=True)
    # Other verbs than these do without a faked clock, under which Python's `time.sleep` fails.
    verbs = "case $1 in up|join) ;; *) unset LD_PRELOAD ;; esac"
    program.write_text(f'#!/bin/sh\n{verbs}\nexec "{sys.executable}" -m cordee.cli.main "$@"\n')
    program.chmod(0o755)


def differences(one: Sequence[Step], other: Sequence[Step]) -> list[str]:
    """Where two guides do not have the same steps."""
    pairs = [(f"{a.line} and {b.line}", a, b) for a, b in zip(one, other, strict=False)]
    told = [
        f"lines {where}: {a.text or a.target!r} and {b.text or b.target!r}"
        for where, a, b in pairs
        if (a.kind, a.text, a.options) != (b.kind, b.text, b.options)
        or (a.kind != "not run" and a.target != b.target)  # reasons may be in either language
    ]
    return told + ([f"{len(one)} steps and {len(other)}"] if len(one) != len(other) else [])
