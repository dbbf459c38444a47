"""What counts as a race between the programs of one launch, in place of ttsem's own rule, which knows no order of them.

Two accesses race unless one happens before the other, regardless of the order in which ttsem runs the programs:

- The one thread that issues a program's atomics knows what the program did before its last barrier, and nothing of what
  the other threads did since.
- An atomic with release order hands over what this thread knows; one with acquire order takes it over, for all threads
  of its program, as Triton passes the result of an atomic to them through a barrier.
- With scope "cta" an atomic is no better than a plain store.
"""

import re

import numpy as np
from ttsem import ops, pidraces

# Kinds of entries in ttsem's log, which has no barriers of its own. Silent stores do not change what they overwrite.
LOAD, STORE, SILENT_STORE, ATOMIC, BARRIER = "r", "w", "s", "a", "b"
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
    log = [(*entry[:3], entry[3][:, None] + np.arange(entry[4])) for entry in log or []]
    stored = [places.ravel() for _, kind, _, places in log if kind not in (LOAD, BARRIER)]
    written = np.unique(np.concatenate([np.zeros(0, np.int64), *stored]))
    numbers = {program: number for number, program in enumerate(dict.fromkeys(program for program, *_ in log))}
    # Vector clocks. Of each program, what all of its threads know and what the one that issues atomics does: the place
    # in the log up to which it has seen each program's loads and stores [0] and atomics [1].
    threads = np.zeros((len(numbers), 2, len(numbers)), np.int64)
    issuer = threads.copy()
    released = {}  # by address, such a clock
    # By kind, program and written byte, the place in the log of the latest access.
    latest = {kind: np.zeros((len(numbers), written.size), np.int64) for kind in (LOAD, STORE, ATOMIC)}
    for now, (program, kind, op, touched) in enumerate(log, 1):
        own, order = numbers[program], 0
        if kind == BARRIER:
            threads[own, 0, own] = now
            issuer[own] = threads[own]
            continue
        if kind == ATOMIC:
            address = touched.item(0)  # those of the kernels have just one
            order, scope = (int(re.search(rf"\b{name} = (\d)", op)[1]) for name in ("sem", "scope"))
        if kind == SILENT_STORE or (kind == ATOMIC and scope == CTA):
            kind, order = STORE, 0
        if order in ACQUIRE and address in released:
            for clock in (threads, issuer):
                clock[own] = np.maximum(clock[own], released[address])
        places = np.flatnonzero(np.isin(written, touched))
        for other_kind, times in latest.items():
            if kind == other_kind != STORE:  # two loads or two atomics
                continue
            races = times[:, places] > threads[own, int(other_kind == ATOMIC), :, None]
            races[own] = False
            if races.any():
                other, place = np.argwhere(races)[0]
                sides = log[times[other, places[place]] - 1][:3], log[now - 1][:3]
                found = int(written[places[place]]), *sides, int(races.any(0).sum())
                return pidraces.PidRace("neither happens before the other", *found)
        latest[kind][own, places] = now
        if order in RELEASE:
            issuer[own, 1, own] = now
            released[address] = np.maximum(issuer[own], released.get(address, 0))
    return None
