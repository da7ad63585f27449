"""A whole cluster of real nodes in one process, on virtual time.

Take the first of the agenda, hand it to its node, carry out the node's effects, note when the node
wants to wake. The codec, sizes and encryption are the real ones. Every effect goes into a running
hash, the trace: the same seed gives the same trace.
"""

import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address
from random import Random
from typing import Any

from serfd.config import GOSSIP_PORT, Config
from serfd.effects import (
    Address,
    Answer,
    Close,
    Command,
    Connect,
    Effect,
    Emit,
    Finish,
    Remember,
    SaveKeyring,
    SendPacket,
    Stop,
    Write,
)
from serfd.errors import CommandError
from serfd.gossip.member_table import socket_address
from serfd.serf.events import MemberEvent, Query, Status
from serfd.serf.node import Node
from serfd.serf.queries import EVERYBODY, QueryParams
from serfd.sim import checks
from serfd.sim.agenda import Agenda, Step
from serfd.sim.faults import Network
from serfd.sim.process import MET, STARTS, Asked, End, Happening, Process
from serfd.sim.streams import Streams
from serfd.wire.sealing import NONCE_SIZE, Keyring

HISTORY_MAX = 200_000
"""Happenings kept; older ones are forgotten."""
RECEIVE_BUFFER = 1_800
"""Packets that a paused process's socket holds; more are lost."""

_HEAD = struct.Struct("<dIc")


class CheckFailed(AssertionError):
    """Something that must hold in every run does not."""


class Cluster:
    """Nodes, the network between them, virtual time, and one queue of what happens next.

    A place in the cluster has a key, `n0`, `n1` …, which is also its node's name.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        config: Config | None = None,
        keys: Sequence[bytes] = (),
        names: str = "n{}",
        first: int = 0,
        latency: float = 0.0004,
        jitter: float = 0.0002,
        loss: float = 0.0,
        joined: bool = True,
    ) -> None:
        """`keys`: seals everything, the first key is the primary.

        `names`: makes a key of a number, `first` and on.
        A node starts with the `config` and `keys` as they are then: a restart can change them.
        `latency`, `jitter`: seconds one way; `loss`: the share of packets lost in the whole run.
        With `joined`, all have met when this returns; without, each is alone.
        """
        self.config = config if config is not None else Config()
        self.keys = tuple(keys)
        self.names = names
        self.network = Network(Random(f"{seed} network"), latency=latency, jitter=jitter, loss=loss)
        self.processes: dict[str, Process] = {}
        """The last process of each place, by its key."""
        self.history: deque[Happening] = deque(maxlen=HISTORY_MAX)
        self.packets = 0
        self.bytes = 0
        self.asked: list[Asked] = []
        """Commands that are not finished."""
        self.replay = f"Cluster(size={size}, seed={seed})"
        """How to see the same run again."""
        self._seed = seed
        self._rng = Random(f"{seed} cluster")
        self._agenda = Agenda()
        self.everyone: list[Process] = []
        self._at_address: dict[Address, Process] = {}
        self._tickets: dict[Command[Any], Asked] = {}
        self._streams = Streams(self._agenda, self.network, self._at_address, self._give)
        self._hash = blake2b(digest_size=8)
        self._was_faulty = loss > 0
        self._touched_at = 0.0
        interval = self.config.gossip.probe_interval
        for at in sorted(self._rng.uniform(0, interval) for _ in range(size)):
            # Nodes that start at one instant would probe in step for ever.
            self._run_to(at)
            self.start(names.format(first + len(self.processes)))
        self._run_to(interval)
        if joined and size > 1:
            self.join_all()

    def __repr__(self) -> str:
        """How to see the same run again."""
        return self.replay

    # Time.

    @property
    def now(self) -> float:
        """Virtual seconds since the run's begin."""
        return self._agenda.now

    def run(self, seconds: float) -> None:
        """Let so much virtual time pass, then see that all holds that must."""
        self._run_to(self.now + seconds)
        self.check()

    def pass_time(self, seconds: float) -> None:
        """As `run`, for who does not ask whether the protocol holds."""
        self._run_to(self.now + seconds)

    def run_until(
        self, condition: Callable[[], object], limit: float, *, every: float = 0.05
    ) -> float:
        """Run until `condition`, asked every so many seconds, is true; gives the seconds it took.

        Raises CheckFailed if it is not within `limit` seconds.
        """
        begin = self.now
        while not condition():
            if self.now - begin > limit:
                why = self.disagreement or "all agree"
                raise self._broken(f"what was waited for did not come in {limit:g} s: {why}")
            self._run_to(self.now + every)
        self.check()
        return self.now - begin

    def after(self, seconds: float, step: Step, *args: Any) -> None:
        """Call `step` in so many seconds of virtual time."""
        self._agenda.after(seconds, step, *args)

    def check(self) -> None:
        """See that all holds that must, now. Raises CheckFailed, which names the first thing."""
        running = self.running
        for process in running:
            self.insist(checks.bounds(process))
            self.insist(checks.once(process))
        self.insist(checks.conservation(self.asked, self.now, checks.command_bound(self.config)))
        if not self._was_faulty:
            self.insist(checks.accuracy(self.history))
        quiet = self.quiet_for
        if quiet > self.detection_bound:
            self.insist(checks.completeness(running, self.gone(End.CRASHED)))
        if quiet > self.convergence_bound:
            self.insist(checks.convergence(running, self.gone()))
            self.insist(checks.rest(running))

    @property
    def quiet_for(self) -> float:
        """Seconds since the last fault or change ended; 0 while one lasts."""
        if self.network.is_disturbed or any(p.held is not None for p in self.running):
            return 0.0
        return self.now - self._touched_at

    @property
    def detection_bound(self) -> float:
        """Seconds in which all live nodes see a crash, with the members and health there are."""
        return checks.detection_bound(self.config.gossip, self._members, score=self._score)

    @property
    def convergence_bound(self) -> float:
        """Seconds in which all live nodes agree once faults stop."""
        return checks.convergence_bound(self.config, self._members, score=self._score)

    @property
    def disagreement(self) -> str | None:
        """The first thing that live nodes see differently from each other, or from the truth."""
        return checks.convergence(self.running, self.gone())

    @property
    def unrest(self) -> str | None:
        """The first thing that shows that not all is said yet."""
        return checks.rest(self.running)

    @property
    def trace(self) -> str:
        """The hash of every effect so far."""
        return self._hash.hexdigest()

    # What it has.

    @property
    def running(self) -> list[Process]:
        """Every process that has not ended."""
        return [process for process in self.processes.values() if process.is_running]

    def gone(self, end: End | None = None) -> list[Process]:
        """The processes that ended, in this way if one is given, and that nobody followed."""
        return [
            process
            for process in self.processes.values()
            if process.end is not None and end in (None, process.end)
        ]

    def statuses(self, name: str, *, seen_by: str | Collection[str] = "everyone") -> set[Status]:
        """What the member is for running nodes: `everyone`, the `others`, or those of these keys.

        Who does not list it contributes `Status.NONE`.
        """
        return {
            member.status if (member := process.node.member(name)) is not None else Status.NONE
            for process in self.running
            if (
                seen_by == "everyone"
                or (seen_by == "others" and process.name != name)
                or (not isinstance(seen_by, str) and process.key in seen_by)
            )
        }

    def happened(self, what: str, *, about: str | None = None) -> list[Happening]:
        """Everything of this kind that happened, about this member if one is given."""
        return [
            one
            for one in self.history
            if one.what == what and (about is None or one.about == about)
        ]

    def all_list_all(self) -> bool:
        """Whether every running node lists every other as alive."""
        running = self.running
        names = [process.name for process in running]
        return all(
            (member := process.node.member(name)) is not None and member.status is Status.ALIVE
            for process in running
            if process.node.member_count >= len(names)
            for name in names
        ) and all(process.node.member_count >= len(names) for process in running)

    # Commands.

    def start(
        self, key: str, *, name: str | None = None, address_of: Process | None = None
    ) -> Process:
        """Start a node, alone at first. `address_of`: its address is that of an ended process."""
        assert key not in self.processes or not self.processes[key].is_running, f"{key} runs"
        number = len(self.everyone)
        addr = address_of.addr if address_of is not None else _address_bytes(number)
        rng = Random(f"{self._seed} {key} {number}")
        nonces = Random(f"{self._seed} {key} {number} nonces")
        node = Node(
            self.config,
            name=name or key,
            addr=addr,
            port=GOSSIP_PORT,
            keyring=Keyring(self.keys),
            now=self.now,
            rng=rng,
            nonce=lambda: nonces.randbytes(NONCE_SIZE),
            log_suffix=f".{key}",
        )
        address = socket_address(addr, GOSSIP_PORT)
        process = Process(key, node, address, addr, number=number, now=self.now)
        process.is_sealed = bool(self.keys) and self.config.encrypt_verify_outgoing
        process.label = self.config.cluster_label.encode()
        self.everyone.append(process)
        self.processes[key] = process
        self._at_address[address] = process
        self._touch()
        self._settle(process)
        return process

    def join(self, key: str, *via: str) -> Asked:
        """Let a node join through others, running or not; gives the command."""
        process = self.processes[key]
        addresses = [self.processes[other].address for other in via]
        return self.ask(process, process.node.join(self.now, addresses))

    def join_all(self, limit: float = 30.0) -> float:
        """Let all join the first at this instant; gives the seconds until all list all.

        Whom it does not answer tries again, as the agent does.
        """
        first, *others = self.running
        for process in others:
            self._join_until_answered(process, first)
        took = self.run_until(self.all_list_all, limit)
        self.tell("all", MET, f"{took:.2f} s after joining")
        return took

    def kill(self, key: str) -> None:
        """End a process without a word: all it knew is lost, and its sockets are closed."""
        self._was_faulty = True
        self._stop(self.processes[key], End.CRASHED)

    def restart(self, key: str, *, new_address: bool = False, rejoin: bool = True) -> Process:
        """Start a new process in a place; kills the old one first if it runs.

        With `rejoin` it joins through others until one answers.
        """
        old = self.processes[key]
        if old.is_running:
            self.kill(key)
        process = self.start(key, name=old.name, address_of=None if new_address else old)
        self.tell(key, STARTS, f"at {process.address}")
        if rejoin:
            self._join_until_answered(process)
        return process

    def leave(self, key: str) -> Asked:
        """Ask a node to leave; when it has, its process ends."""
        process = self.processes[key]
        self.tell(key, "leaves")
        asked = self.ask(process, process.node.leave(self.now))
        asked.then.append(self._stop_left)
        return asked

    def force_leave(self, key: str, name: str, *, prune: bool = False) -> Asked:
        """Ask a node to declare another as left."""
        self.tell(key, "forces out", name)
        process = self.processes[key]
        return self.ask(process, process.node.force_leave(self.now, name, prune=prune))

    def update_tags(self, key: str, tags: Mapping[str, str]) -> Asked:
        """Ask a node to change its tags."""
        process = self.processes[key]
        return self.ask(process, process.node.update_tags(self.now, tags))

    def user_event(
        self, key: str, name: str, payload: bytes = b"", *, coalesce: bool = False
    ) -> Asked:
        """Ask a node to tell everybody something."""
        process = self.processes[key]
        command = process.node.user_event(self.now, name, payload, coalesce=coalesce)
        return self.ask(process, command)

    def query(
        self, key: str, name: str, payload: bytes = b"", params: QueryParams = EVERYBODY
    ) -> Asked:
        """Ask a node to ask everybody something; `Asked.answers` has what came."""
        process = self.processes[key]
        return self.ask(process, process.node.query(self.now, name, payload, params))

    def respond(self, key: str, query: Query, payload: bytes) -> Asked:
        """Let a node answer a query that it heard."""
        process = self.processes[key]
        return self.ask(process, process.node.respond(self.now, query, payload))

    def change_keys(self, key: str, query: str, encryption_key: str = "") -> Asked:
        """Ask a node to change everybody's keyring."""
        process = self.processes[key]
        return self.ask(process, process.node.change_keys(self.now, query, encryption_key))

    def ask(self, process: Process, command: Command[Any]) -> Asked:
        """Note that a node has taken a command; gives what comes of it."""
        assert process.is_running, f"{process.key} does not run"
        assert process.held is None, f"{process.key} is paused"
        asked = Asked(process, command, self.now)
        self.asked.append(asked)
        self._tickets[command] = asked
        self._touch()
        # Effects are carried out in the next turn, so that the caller can wait for the result.
        self._agenda.after(0.0, self._settle, process)
        return asked

    def pause(self, key: str, seconds: float) -> None:
        """Hold a process up: its inputs wait, and come before its timers when it goes on."""
        process = self.processes[key]
        assert process.held is None, f"{key} is paused already"
        self._was_faulty = True
        process.held = []
        self.tell(key, "is paused", f"for {seconds:.1f} s")
        self.after(seconds, self._resume, process)

    @contextmanager
    def partition(self, island: Collection[str]) -> Iterator[None]:
        """Cut the network between these places and all others."""
        rest = [key for key in self.processes if key not in set(island)]
        with self.cut(island, rest), self.cut(rest, island):
            yield

    @contextmanager
    def cut(self, sources: Collection[str], targets: Collection[str]) -> Iterator[None]:
        """Nothing gets from `sources` to `targets`; the other way it does."""
        with self._disturbance(self.network.cut(sources, targets)):
            yield

    @contextmanager
    def lossy(self, share: float) -> Iterator[None]:
        """So many packets are lost."""
        with self._disturbance(self.network.lossy(share)):
            yield

    @contextmanager
    def slow(self, key: str, lag: float) -> Iterator[None]:
        """Everything to and from this place takes `lag` seconds longer."""
        with self._disturbance(self.network.slow(key, lag)):
            yield

    # Faults.

    def _resume(self, process: Process) -> None:
        if not process.is_running:
            return
        waiting, process.held = process.held, None
        assert waiting is not None
        self.tell(process.key, "goes on")
        self._touch()
        # As the driver does: what came in meanwhile is read before timers are looked at.
        for step, args in waiting:
            step(*args)
        process.wake_at = None
        self._set_alarm(process)

    @contextmanager
    def _disturbance(self, disturbance: AbstractContextManager[None]) -> Iterator[None]:
        self._was_faulty = True
        with disturbance:
            yield
        self._touch()

    def _stop(self, process: Process, end: End) -> None:
        process.end = end
        process.ended_at = self.now
        self.tell(process.key, end.value)
        process.suspects = ()
        process.held = None
        self._streams.reset(process)
        for asked in [one for one in self.asked if one.process is process]:
            self._drop(asked)
        self._touch()

    def _stop_left(self, asked: Asked) -> None:
        if not isinstance(asked.result, CommandError):
            self._stop(asked.process, End.LEFT)

    def _join_until_answered(self, process: Process, via: Process | None = None) -> None:
        """Join again and again, as the agent does; through random others if not `via` this one."""
        process.is_joining = True
        if process.held is not None:
            process.held.append((self._join_until_answered, (process, via)))
            return
        others = [other for other in self.running if other is not process]
        if not process.is_running or not others:
            return

        def tried(asked: Asked) -> None:
            if asked.result.contacted:
                process.is_joining = False
            else:
                self.after(self.config.retry_interval, self._join_until_answered, process, via)

        to = (via or self._rng.choice(others)).address
        self.ask(process, process.node.join(self.now, [to])).then.append(tried)

    # Commands and events.

    def _finished(self, process: Process, command: Command[Any], result: Any) -> None:
        asked = self._tickets.get(command)
        assert asked is not None, f"{command} of {process.key} is finished twice, or was not asked"
        asked.finished_at = self.now
        asked.result = result
        self._drop(asked)
        for step in asked.then:
            step(asked)

    def _keyring_saved(self, process: Process) -> None:
        if process.is_running:
            process.node.keyring_saved(self.now, None)
            self._settle(process)

    def _drop(self, asked: Asked) -> None:
        self.asked.remove(asked)
        del self._tickets[asked.command]

    def _answered(self, asked: Asked, answer: Any) -> None:
        asked.answers.append(answer)
        for step in asked.heard:
            step(answer)

    def _emitted(self, process: Process, event: Any) -> None:
        process.events.append((self.now, event))
        if isinstance(event, MemberEvent):
            for member in event.members:
                self.tell(process.key, event.name, member.name)
        for listener in process.listeners:
            listener(event)

    # Inputs.

    def _give(self, process: Process, step: Step, *args: Any) -> None:
        """Hand something to a process; it waits while the process is paused."""
        if not process.is_running:
            return
        if process.held is not None:
            process.held.append((self._give, (process, step, *args)))
            return
        step(process, *args)
        self._settle(process)

    def _settle(self, process: Process) -> None:
        """Carry out what the process wants, and note how it stands."""
        if process.end is not None:
            return
        for effect in process.node.take_effects():
            self._do(process, effect)
        if not process.is_running:
            return
        machine = process.machine
        if machine._suspicions or process.suspects:
            self._compare_suspects(process)
        if machine.awareness.score > process.score_max:
            process.score_max = machine.awareness.score
        if machine.local.incarnation != process.incarnation:
            process.incarnation = machine.local.incarnation
            self.tell(process.key, "raises its incarnation", str(process.incarnation))
        self._set_alarm(process)

    def _compare_suspects(self, process: Process) -> None:
        before, now = process.suspects, tuple(process.machine._suspicions)
        if now != before:
            process.suspects = now
            for name in now:
                if name not in before:
                    self.tell(process.key, "suspects", name)
            for name in before:
                if name not in now:
                    self.tell(process.key, "clears", name)

    def _set_alarm(self, process: Process) -> None:
        due = process.node.next_wakeup()
        if due is not None and due != process.wake_at:
            process.wake_at = due
            self._agenda.push(max(due, self.now), self._ring, process, due)

    def _ring(self, process: Process, due: float) -> None:
        if process.wake_at != due or process.end is not None or process.held is not None:
            return
        process.wake_at = None
        process.node.wake(self.now)
        self._settle(process)

    # Effects.

    def _do(self, process: Process, effect: Effect) -> None:
        match effect:
            case SendPacket(data, to):
                self._note(process, b"p", data)
                self._send(process, data, to)
            case Emit(event):
                self._note(process, b"e", repr(event).encode())
                self._emitted(process, event)
            case Finish(command, result):
                self._note(process, b"f", f"{command!r} {result!r}".encode())
                self._finished(process, command, result)
            case Answer(command, answer):
                self._note(process, b"a", repr(answer).encode())
                self._answered(self._tickets[command], answer)
            case Remember(lines):
                self._note(process, b"r", repr(lines).encode())
            case SaveKeyring(keys):
                self._note(process, b"k", b"%d" % len(keys))
                self._agenda.after(0.0, self._keyring_saved, process)
            case Stop(reason):
                self._note(process, b"s", reason.encode())
                self._stop(process, End.STOPPED)
            case Connect(stream, to):
                self._note(process, b"o", str(to).encode())
                self._streams.connect(process, stream, to)
            case Write(stream, data):
                self._note(process, b"w", data)
                sealed = process.sealed_part(data)
                if sealed is not None:
                    self.insist(checks.stream_secrecy(sealed, self.processes))
                self._streams.write(process, stream, data)
            case Close(stream):
                self._note(process, b"c", b"%d" % stream)
                self._streams.close(process, stream)

    def _note(self, process: Process, kind: bytes, what: bytes) -> None:
        self._hash.update(_HEAD.pack(self.now, process.number, kind) + what)

    # Packets.

    def _send(self, process: Process, data: bytes, to: Address) -> None:
        self.packets += 1
        self.bytes += len(data)
        sealed = process.sealed_part(data)
        if sealed is not None:
            self.insist(checks.packet_secrecy(sealed, self.processes))
        network = self.network
        target = self._at_address.get(to)
        if target is None or network.loses() or not network.passes(process.key, target.key):
            return
        due = self.now + network.delay(process.key, target.key)
        self._agenda.push(due, self._arrives, to, data, process.address)

    def _arrives(self, to: Address, data: bytes, source: Address) -> None:
        process = self._at_address[to]
        if process.end is not None:
            return
        if process.held is not None:
            if len(process.held) < RECEIVE_BUFFER:
                process.held.append((self._arrives, (to, data, source)))
            return
        process.node.packet_received(self.now, data, source)
        self._settle(process)

    # Steps.

    def _run_to(self, end: float) -> None:
        try:
            self._agenda.run_to(end)
        except Exception as error:
            error.add_note(f"at {self.now:.6f} s of {self.replay}")
            raise

    def _touch(self) -> None:
        self._touched_at = self.now

    def tell(self, who: str, what: str, about: str = "") -> None:
        """Note something for the history of this run."""
        self.history.append(Happening(self.now, who, what, about))

    def insist(self, fault: str | None) -> None:
        """Raise CheckFailed if there is a fault; it tells how to see it again."""
        if fault is not None:
            raise self._broken(fault)

    def _broken(self, what: str) -> CheckFailed:
        return CheckFailed(f"{what}; at {self.now:.3f} s of {self.replay}, trace {self.trace}")

    @property
    def _members(self) -> int:
        return max((len(p.machine.table) for p in self.running), default=1)

    @property
    def _score(self) -> int:
        return max((process.score_max for process in self.running), default=0)


def _address_bytes(number: int) -> bytes:
    """Addresses of every form there is, in turn: IPv4, IPv4 in IPv6 form, IPv6."""
    ipv4 = IPv4Address("10.0.0.1") + number
    forms = (ipv4.packed, bytes(10) + b"\xff\xff" + ipv4.packed)
    return (*forms, (IPv6Address("fd00::1") + number).packed)[number % 3]
