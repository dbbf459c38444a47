"""What counts as a race between the programs of one launch, in place of ttsem's own rule.

ttsem knows no order between programs: where one loads what another stores it reports a race, even if a counter stands
between the two. Here two accesses race unless one happens before the other:

- The one thread that issues a program's atomics knows what the program did before its last barrier, and nothing of what
  the other threads did since.
- An atomic with release order hands over what this thread knows; one with acquire order takes it over, for all threads
  of its program, as Triton passes the result of an atomic to them through a barrier.
- With scope "cta" an atomic does neither for another program, and is to it no better than a plain store.

That ttsem runs one program after another orders nothing, so a race is found in whichever order they run.
"""

import re

import numpy as np
from ttsem import ops, pidraces

# Kinds of access in ttsem's log, which has no barriers of its own; the others are stores.
LOAD, ATOMIC, BARRIER = "r", "a", "b"
# Numbers in Triton's IR: of the orders release and acq_rel, of acquire and acq_rel, and of the scope "cta".
ACQUIRE, RELEASE, CTA = (2, 4), (3, 4), 2


def install(monkeypatch):
    """From now on ttsem judges by this rule."""
    for barrier in ("ttg.barrier", "gpu.barrier"):
        monkeypatch.setitem(ops.OPS, barrier, _log_barrier)
    monkeypatch.setattr(pidraces, "find_race", find_race)


def _log_barrier(interpreter, op, arguments):
    memory = interpreter.memory
    if memory.access_log is not None:
        memory.access_log.append((memory.agent, BARRIER, "", np.zeros(0, np.int64), 1, None))
    return []


def find_race(log):
    """The first race in ttsem's log of a launch: entries of (program, kind, op, addresses, bytes at each, values)."""
    log = _contended(log or [])
    numbers = {program: number for number, program in enumerate(dict.fromkeys(program for program, *_ in log))}
    # Vector clocks. Of each program, what all of its threads know and what the one that issues atomics does: the place
    # in the log up to which it has seen each program's loads and stores [0] and atomics [1].
    threads = np.zeros((len(numbers), 2, len(numbers)), np.int64)
    issuer = threads.copy()
    released = {}  # by address, such a clock
    earlier = []
    for now, (program, kind, op, places) in enumerate(log, 1):
        own = numbers[program]
        if kind == BARRIER:
            threads[own, 0, own] = now
            issuer[own] = threads[own]
            continue
        order, is_atomic = 0, False
        if kind == ATOMIC:
            order, scope = (int(re.search(rf"\b{name} = (\d)", op)[1]) for name in ("sem", "scope"))
            is_atomic = scope != CTA
        address = int(places[0])  # an atomic of the kernels has just one
        if is_atomic and order in ACQUIRE and address in released:
            for clock in (threads, issuer):
                clock[own] = np.maximum(clock[own], released[address])
        for then, other, other_kind, other_op, other_places, other_is_atomic in earlier:
            if other == program or kind == other_kind == LOAD or (is_atomic and other_is_atomic):
                continue
            is_ordered = then <= threads[own, int(other_kind == ATOMIC), numbers[other]]
            if is_ordered or places[0] > other_places[-1] or other_places[0] > places[-1]:
                continue
            both = _common(places, other_places)
            if both.size:
                sides = (other, other_kind, other_op), (program, kind, op)
                return pidraces.PidRace("neither happens before the other", int(both[0]), *sides, both.size)
        earlier.append((now, program, kind, op, places, is_atomic))
        if is_atomic and order in RELEASE:
            issuer[own, 1, own] = now
            released[address] = np.maximum(issuer[own], released.get(address, 0))
    return None


def _contended(log):
    """What a race can lie in: (program, kind, op, those of its bytes that several programs touch), and the barriers."""
    written = [(entry[3].min(), entry[3].max() + entry[4]) for entry in log if entry[1] not in (LOAD, BARRIER)]
    if not written:
        return []
    starts, ends = np.array(written).T
    accesses, touched = [], {}
    for program, kind, op, addresses, size, _ in log:
        # Most loads are from the inputs, which nobody writes.
        if kind == LOAD and not ((addresses.min() < ends) & (addresses.max() + size > starts)).any():
            continue
        places = np.unique(addresses[:, None] + np.arange(size))
        accesses.append((program, kind, op, places))
        touched.setdefault(program, []).append(places)
    once = [np.unique(np.concatenate(places)) for places in touched.values()]
    places, programs = np.unique(np.concatenate(once), return_counts=True)
    shared = places[programs > 1]
    accesses = [(program, kind, op, _common(places, shared)) for program, kind, op, places in accesses]
    return [access for access in accesses if access[1] == BARRIER or access[3].size]


def _common(places, others):
    """The places that are among others, which are sorted."""
    if not others.size:
        return others
    return places[others[np.minimum(np.searchsorted(others, places), others.size - 1)] == places]
