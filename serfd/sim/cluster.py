"""A whole cluster of real nodes in one process, on virtual time.

One heap of `(time, order, step, arguments)`. Take the first, hand it to its node, carry out the
node's effects, note when the node wants to wake. The codec, sizes and encryption are the real ones.
Every effect goes into a running hash, the trace: the same seed gives the same trace.
"""

import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from heapq import heappop, heappush
from ipaddress import IPv4Address, IPv6Address
from random import Random
from typing import Any

from serfd.config import GOSSIP_PORT, Config
from serfd.effects import (
    Address,
    Close,
    Command,
    Connect,
    Effect,
    Emit,
    Finish,
    SendPacket,
    StreamId,
    Write,
)
from serfd.errors import CommandError
from serfd.gossip.member_table import socket_address
from serfd.serf.events import MemberEvent, Status
from serfd.serf.node import Node
from serfd.sim import checks
from serfd.sim.faults import RETRANSMIT, Fault, Kind, Network
from serfd.sim.process import Asked, End, Happening, Process, Socket
from serfd.wire.sealing import NONCE_SIZE, Keyring

HISTORY_MAX = 200_000
"""Happenings kept; older ones are forgotten."""
SEGMENT_MAX = 14_480
"""Bytes of a stream that arrive at a time."""
SYN_RETRANSMIT = 1.0
"""Seconds after which a connection attempt is repeated, then doubled."""
TRIES_MAX = 8
"""How often the network tries a segment before it gives up without a word."""
RECEIVE_BUFFER = 1_800
"""Packets that a paused process's socket holds; more are lost."""

Step = Callable[..., None]
Ending = tuple[str | None]
"""The end of a stream, with the error if it did not end well."""

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
        latency: float = 0.0004,
        jitter: float = 0.0002,
        loss: float = 0.0,
        joined: bool = True,
    ) -> None:
        """`keys`: seals everything, the first key is the primary; `names`: makes a key of a number.

        `latency`, `jitter`: seconds one way; `loss`: the share of packets lost in the whole run.
        With `joined`, all have met when this returns; without, each is alone.
        """
        self.now = 0.0
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
        self._queue: list[tuple[float, int, Step, tuple[Any, ...]]] = []
        self._order = 0
        self._everyone: list[Process] = []
        self._at_address: dict[Address, Process] = {}
        self._tickets: dict[Command[Any], Asked] = {}
        self._then: dict[Command[Any], Callable[[Asked], None]] = {}
        self._hash = blake2b(digest_size=8)
        self._was_faulty = loss > 0
        self._touched_at = 0.0
        interval = self.config.gossip.probe_interval
        for at in sorted(self._rng.uniform(0, interval) for _ in range(size)):
            # Nodes that start at one instant would probe in step for ever.
            self._run_to(at)
            self.start(names.format(len(self.processes)))
        self._run_to(interval)
        if joined and size > 1:
            self.join_all()

    def __repr__(self) -> str:
        """How to see the same run again."""
        return self.replay

    # Time.

    def run(self, seconds: float) -> None:
        """Let so much virtual time pass, then see that all holds that must."""
        self._run_to(self.now + seconds)
        self.check()

    def run_until(
        self, condition: Callable[[], object], limit: float, *, every: float = 0.05
    ) -> float:
        """Run until `condition`, asked every so many seconds, is true; gives the seconds it took.

        Raises CheckFailed if it is not within `limit` seconds.
        """
        begin = self.now
        while not condition():
            if self.now - begin > limit:
                raise self._broken(f"what was waited for did not come in {limit:g} s")
            self._run_to(self.now + every)
        self.check()
        return self.now - begin

    def at(self, seconds: float, step: Step, *args: Any) -> None:
        """Call `step` in so many seconds."""
        self._push(self.now + seconds, step, *args)

    def check(self) -> None:
        """See that all holds that must, now. Raises CheckFailed, which names the first thing."""
        running = self.running
        for process in running:
            self._insist(checks.bounds(process))
            self._insist(checks.lamport_times(process))
        self._insist(checks.conservation(self.asked, self.now, checks.command_bound(self.config)))
        if not self._was_faulty:
            self._insist(checks.accuracy(self.history))
        quiet = self.quiet_for
        if quiet > self.detection_bound:
            self._insist(checks.completeness(running, self.gone(End.CRASHED)))
        if quiet > self.convergence_bound:
            self._insist(checks.convergence(running, self.gone()))
            self._insist(checks.rest(running))

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
        number = len(self._everyone)
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
        if address_of is not None:
            # Those who knew the old process find the new one by themselves.
            process.group = address_of.group
        self._everyone.append(process)
        self.processes[key] = process
        self._at_address[address] = process
        self._touch()
        self._settle(process)
        return process

    def join(self, key: str, *via: str) -> Asked:
        """Let a node join through others, running or not; gives the command."""
        process = self.processes[key]
        addresses = [self.processes[other].address for other in via]
        asked = self._ask(process, process.node.join(self.now, addresses))
        self._when_finished(asked, self._met, [self._at_address[to] for to in addresses])
        return asked

    def join_all(self, limit: float = 30.0) -> float:
        """Let all join the first at this instant; gives the seconds until all list all."""
        first, *others = [process.key for process in self.running]
        for key in others:
            self.join(key, first)
        return self.run_until(self.all_list_all, limit)

    def kill(self, key: str) -> None:
        """End a process without a word: all it knew is lost, and its sockets are closed."""
        self._was_faulty = True
        self._tell(key, "crashes")
        self._stop(self.processes[key], End.CRASHED)

    def restart(self, key: str, *, new_address: bool = False, rejoin: bool = True) -> Process:
        """Start a new process in a place; kills the old one first if it runs.

        With `rejoin` it joins through others until one answers.
        """
        old = self.processes[key]
        if old.is_running:
            self.kill(key)
        self._tell(key, "starts again", "at a new address" if new_address else "")
        process = self.start(key, name=old.name, address_of=None if new_address else old)
        if rejoin:
            self._rejoin(process)
        return process

    def leave(self, key: str) -> Asked:
        """Ask a node to leave; when it has, its process ends."""
        process = self.processes[key]
        self._tell(key, "leaves")
        asked = self._ask(process, process.node.leave(self.now))
        self._when_finished(asked, self._stop_left)
        return asked

    def force_leave(self, key: str, name: str, *, prune: bool = False) -> Asked:
        """Ask a node to declare another as left."""
        self._tell(key, "forces out", name)
        process = self.processes[key]
        return self._ask(process, process.node.force_leave(self.now, name, prune=prune))

    def update_tags(self, key: str, tags: Mapping[str, str]) -> Asked:
        """Ask a node to change its tags."""
        process = self.processes[key]
        return self._ask(process, process.node.update_tags(self.now, tags))

    def pause(self, key: str, seconds: float) -> None:
        """Hold a process up: its inputs wait, and come before its timers when it goes on."""
        process = self.processes[key]
        assert process.held is None, f"{key} is paused already"
        self._was_faulty = True
        process.held = []
        self._tell(key, "is paused", f"for {seconds:.1f} s")
        self.at(seconds, self._resume, process)

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

    def inflict(self, fault: Fault) -> None:
        """Let this go wrong in its time; the cluster goes on by itself while it lasts."""
        self.at(fault.at, self._begin, fault)

    # Faults.

    def _begin(self, fault: Fault) -> None:
        others = [key for key in self.processes if key not in fault.who]
        key = fault.who[0] if fault.who else ""
        if any(not self.processes[one].is_running for one in fault.who):
            return
        match fault.kind:
            case Kind.CRASH:
                self.kill(key)
            case Kind.BOUNCE | Kind.MOVE:
                self.kill(key)
                self.at(fault.lasts, self._come_back, key, fault.kind is Kind.MOVE)
            case Kind.PAUSE:
                self.pause(key, fault.lasts)
            case Kind.SLOW:
                self._for(fault, self.slow(key, fault.much))
            case Kind.DEAF:
                self._for(fault, self.cut(others, fault.who))
            case Kind.MUTE:
                self._for(fault, self.cut(fault.who, others))
            case Kind.PARTITION:
                self._for(fault, self.partition(fault.who))
            case Kind.LOSS:
                self._for(fault, self.lossy(fault.much))
            case Kind.LEAVE:
                self.leave(key)
            case Kind.RETURN:
                asked = self.leave(key)
                self._when_finished(asked, self._left_to_return, fault.lasts)
            case Kind.TAG:
                self._tell(key, "changes a tag")
                self.update_tags(key, {"changed": f"{self.now:.3f}"})

    def _for(self, fault: Fault, disturbance: Any) -> None:
        self._tell(" ".join(fault.who), str(fault.kind.value), f"for {fault.lasts:.1f} s")
        stack = ExitStack()
        stack.enter_context(disturbance)
        self.at(fault.lasts, self._over, stack, fault)

    def _over(self, stack: ExitStack, fault: Fault) -> None:
        stack.close()
        self._tell(" ".join(fault.who), f"no longer {fault.kind.value}")

    def _come_back(self, key: str, new_address: bool) -> None:  # noqa: FBT001 - by the queue
        self.restart(key, new_address=new_address)

    def _left_to_return(self, asked: Asked, after: float) -> None:
        self._stop_left(asked)
        self.at(after, self._come_back, asked.process.key, False)  # noqa: FBT003 - by the queue

    def _resume(self, process: Process) -> None:
        waiting, process.held = process.held, None
        assert waiting is not None
        if not process.is_running:
            return
        self._tell(process.key, "goes on")
        self._touch()
        # As the driver does: what came in meanwhile is read before timers are looked at.
        for step, args in waiting:
            step(*args)
        process.wake_at = None
        self._set_alarm(process)

    @contextmanager
    def _disturbance(self, disturbance: Any) -> Iterator[None]:
        self._was_faulty = True
        with disturbance:
            yield
        self._touch()

    def _stop(self, process: Process, end: End) -> None:
        process.end = end
        process.ended_at = self.now
        process.suspects = ()
        process.held = None
        for socket in process.sockets.values():
            socket.is_open = False
            if socket.is_connected:
                self._transmit(socket, ("read: connection reset by peer",))
        process.sockets.clear()
        for asked in [one for one in self.asked if one.process is process]:
            self._drop(asked)
        self._touch()

    def _stop_left(self, asked: Asked) -> None:
        if not isinstance(asked.result, CommandError):
            self._stop(asked.process, End.LEFT)

    def _rejoin(self, process: Process) -> None:
        """Join through a random other, again and again until one answers, as the agent does."""
        if not process.is_running:
            return
        others = [other for other in self.running if other is not process]
        if not others:
            return
        via = self._rng.choice(others)
        asked = self._ask(process, process.node.join(self.now, [via.address]))
        self._when_finished(asked, self._rejoined, via)

    def _rejoined(self, asked: Asked, via: Process) -> None:
        self._met(asked, [via])
        if not asked.result.contacted:
            self.at(self.config.retry_interval, self._rejoin, asked.process)

    def _met(self, asked: Asked, others: Sequence[Process]) -> None:
        if isinstance(asked.result, CommandError) or not asked.result.contacted:
            return
        group = asked.process.group
        for other in others:
            for process in self._everyone:
                if process.group == other.group:
                    process.group = group

    # Commands and events.

    def _ask(self, process: Process, command: Command[Any]) -> Asked:
        assert process.is_running, f"{process.key} does not run"
        assert process.held is None, f"{process.key} is paused"
        asked = Asked(process, command, self.now)
        self.asked.append(asked)
        self._tickets[command] = asked
        self._touch()
        # Effects are carried out in the next turn, so that the caller can wait for the result.
        self._push(self.now, self._turn, process)
        return asked

    def _turn(self, process: Process) -> None:
        self._input(process, self._nothing)

    def _nothing(self, process: Process) -> None:
        """A turn without news: only carries out effects."""

    def _when_finished(self, asked: Asked, then: Callable[..., None], *args: Any) -> None:
        held = self._then.get(asked.command)

        def both(one: Asked) -> None:
            if held is not None:
                held(one)
            then(one, *args)

        self._then[asked.command] = both

    def _finished(self, process: Process, command: Command[Any], result: Any) -> None:
        asked = self._tickets.get(command)
        assert asked is not None, f"{command} of {process.key} is finished twice, or was not asked"
        asked.finished_at = self.now
        asked.result = result
        then = self._then.get(command)
        self._drop(asked)
        if then is not None:
            then(asked)

    def _drop(self, asked: Asked) -> None:
        self.asked.remove(asked)
        del self._tickets[asked.command]
        self._then.pop(asked.command, None)

    def _emitted(self, process: Process, event: Any) -> None:
        process.events.append((self.now, event))
        if isinstance(event, MemberEvent):
            for member in event.members:
                self._tell(process.key, event.name, member.name)

    # Inputs.

    def _input(self, process: Process, step: Step, *args: Any) -> None:
        """Hand something to a process; it waits while the process is paused."""
        if not process.is_running:
            return
        if process.held is not None:
            process.held.append((self._input, (process, step, *args)))
            return
        step(process, *args)
        self._settle(process)

    def _settle(self, process: Process) -> None:
        for effect in process.node.take_effects():
            self._do(process, effect)
        if process.end is None:
            self._look(process)
            self._set_alarm(process)

    def _look(self, process: Process) -> None:
        """Note what the process thinks of others and of itself now."""
        machine = process.node.memberlist
        if machine._suspicions or process.suspects:
            suspects = tuple(machine._suspicions)
            if suspects != process.suspects:
                for name in suspects:
                    if name not in process.suspects:
                        self._tell(process.key, "suspects", name)
                for name in process.suspects:
                    if name not in suspects:
                        self._tell(process.key, "clears", name)
                process.suspects = suspects
        if machine.awareness.score > process.score_max:
            process.score_max = machine.awareness.score
        incarnation = machine.local.incarnation
        if incarnation != process.incarnation:
            process.incarnation = incarnation
            self._tell(process.key, "raises its incarnation", str(incarnation))

    def _set_alarm(self, process: Process) -> None:
        due = process.node.next_wakeup()
        if due is not None and due != process.wake_at:
            process.wake_at = due
            self._push(max(due, self.now), self._ring, process, due)

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
            case Connect(stream, to):
                self._note(process, b"o", str(to).encode())
                self._connect(process, stream, to)
            case Write(stream, data):
                self._note(process, b"w", data)
                socket = process.sockets.get(stream)
                if socket is not None:
                    self._write(socket, data)
            case Close(stream):
                self._note(process, b"c", b"%d" % stream)
                socket = process.sockets.get(stream)
                if socket is not None:
                    self._close(socket)

    def _note(self, process: Process, kind: bytes, what: bytes) -> None:
        self._hash.update(_HEAD.pack(self.now, process.number, kind) + what)

    # Packets.

    def _send(self, process: Process, data: bytes, to: Address) -> None:
        self.packets += 1
        self.bytes += len(data)
        if self.keys:
            self._insist(checks.packet_secrecy(data, self.processes))
        network = self.network
        target = self._at_address.get(to)
        if target is None or network.loses() or not network.passes(process.key, target.key):
            return
        due = self.now + network.delay(process.key, target.key)
        self._push(due, self._arrives, to, data, process.address)

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

    # Streams.

    def _connect(self, process: Process, stream: StreamId, to: Address) -> None:
        socket = Socket(process, stream)
        process.sockets[stream] = socket
        self._knock(socket, to, 0)

    def _knock(self, socket: Socket, to: Address, tries: int) -> None:
        """Send a SYN; if it or its answer is lost, again, until somebody gives up."""
        if not socket.is_open or tries > TRIES_MAX:
            return
        source, target = socket.process.key, self._at_address.get(to)
        network = self.network
        if target is None or not (
            network.passes(source, target.key) and network.passes(target.key, source)
        ):
            self._push(self.now + SYN_RETRANSMIT * 2**tries, self._knock, socket, to, tries + 1)
            return
        due = self.now + network.segment_delay(source, target.key)
        self._push(due, self._knocked, socket, to)

    def _knocked(self, caller: Socket, to: Address) -> None:
        target = self._at_address[to]
        due = self.now + self.network.segment_delay(target.key, caller.process.key)
        if target.end is not None:
            self._push(due, self._refused, caller, to)
            return
        accepted = Socket(target, None)
        accepted.peer, caller.peer = caller, accepted
        accepted.is_connected = True
        # The caller's port is any free one; real ones are not the gossip port.
        peer = Address(caller.process.address.host, 32_768 + self._order % 28_000)
        self._input(target, self._accept, accepted, peer)
        self._push(due, self._connected, caller)

    def _refused(self, caller: Socket, to: Address) -> None:
        if caller.is_open:
            text = f"dial tcp {to}: connect: connection refused"
            self._input(caller.process, self._ended, caller, text)

    def _accept(self, process: Process, socket: Socket, peer: Address) -> None:
        socket.stream = process.node.stream_opened(self.now, peer)
        process.sockets[socket.stream] = socket

    def _connected(self, caller: Socket) -> None:
        caller.is_connected = True
        for data in caller.unsent:
            self._transmit(caller, data)
        caller.unsent.clear()
        if not caller.is_open:
            self._transmit(caller, (None,))

    def _write(self, socket: Socket, data: bytes) -> None:
        if self.keys:
            self._insist(checks.stream_secrecy(data, self.processes))
        for start in range(0, len(data), SEGMENT_MAX):
            segment = data[start : start + SEGMENT_MAX]
            if socket.is_connected:
                self._transmit(socket, segment)
            else:
                socket.unsent.append(segment)

    def _close(self, socket: Socket) -> None:
        self._forget(socket)
        if socket.is_connected:
            self._transmit(socket, (None,))

    def _forget(self, socket: Socket) -> None:
        socket.is_open = False
        if socket.stream is not None:
            socket.process.sockets.pop(socket.stream, None)

    def _transmit(self, socket: Socket, segment: bytes | Ending) -> None:
        peer = socket.peer
        assert peer is not None, "only a connected socket transmits"
        delay = self.network.segment_delay(socket.process.key, peer.process.key)
        socket.arrives = max(socket.arrives, self.now + delay)
        self._push(socket.arrives, self._deliver, socket, segment, 0)

    def _deliver(self, socket: Socket, segment: bytes | Ending, tries: int) -> None:
        peer = socket.peer
        assert peer is not None
        if not peer.is_open:
            return
        if self.now >= socket.held_until and not (
            self.network.passes(socket.process.key, peer.process.key)
            and self.network.passes(peer.process.key, socket.process.key)
        ):
            # Neither the segment nor its acknowledgement gets through: what is behind it waits.
            if tries >= TRIES_MAX:
                return
            socket.held_until = self.now + RETRANSMIT * 2**tries
            tries += 1
        if self.now < socket.held_until:
            socket.arrives = socket.held_until
            self._push(socket.held_until, self._deliver, socket, segment, tries)
        elif isinstance(segment, bytes):
            self._input(peer.process, self._received, peer, segment)
        else:
            self._input(peer.process, self._ended, peer, segment[0])

    def _received(self, process: Process, socket: Socket, segment: bytes) -> None:
        if socket.is_open:
            assert socket.stream is not None
            process.node.stream_received(self.now, socket.stream, segment)

    def _ended(self, process: Process, socket: Socket, error: str | None) -> None:
        if socket.is_open:
            assert socket.stream is not None
            stream = socket.stream
            self._forget(socket)
            process.node.stream_closed(self.now, stream, error)

    # Steps.

    def _push(self, due: float, step: Step, *args: Any) -> None:
        self._order += 1
        heappush(self._queue, (due, self._order, step, args))

    def _run_to(self, end: float) -> None:
        queue = self._queue
        try:
            while queue and queue[0][0] <= end:
                self.now, _, step, args = heappop(queue)
                step(*args)
        except Exception as error:
            error.add_note(f"at {self.now:.6f} s of {self.replay}")
            raise
        self.now = end

    def _touch(self) -> None:
        self._touched_at = self.now

    def _tell(self, who: str, what: str, about: str = "") -> None:
        self.history.append(Happening(self.now, who, what, about))

    def _insist(self, fault: str | None) -> None:
        if fault is not None:
            raise self._broken(fault)

    def _broken(self, what: str) -> CheckFailed:
        return CheckFailed(f"{what}; at {self.now:.3f} s of {self.replay}, trace {self.trace}")

    @property
    def _members(self) -> int:
        return max((len(p.node.memberlist.table) for p in self.running), default=1)

    @property
    def _score(self) -> int:
        return max((process.score_max for process in self.running), default=0)


def _address_bytes(number: int) -> bytes:
    """Addresses of every form there is, in turn: IPv4, IPv4 in IPv6 form, IPv6."""
    ipv4 = IPv4Address("10.0.0.1") + number
    forms = (ipv4.packed, bytes(10) + b"\xff\xff" + ipv4.packed)
    return (*forms, (IPv6Address("fd00::1") + number).packed)[number % 3]
