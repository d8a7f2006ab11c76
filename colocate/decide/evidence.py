"""What a subject felt, and what that says of batch: the numbers on which the law of attribution decides.

A *subject* is a service, or BestEffort. What it feels is a cumulative series, harm T over exposure N: between two
readings it felt x = (T2 - T1) / (N2 - N1), whatever happened between and however often it was sampled.

- waiting: T is the time in which it waited for a CPU, N is time;
- latency: T is the number of requests beyond the target, N is the number of requests;
- displaced (BestEffort): T is minus its CPU time, N is time.

Phases with batch at its floor ("off") and open ("on") follow each other. Each change gives one difference of
neighbours, so that what changes slowly by itself cancels.

    D = mean of x(on) - x(off)          h = what batch may add (`harm`)
    L = log likelihood(adds h or more) - log likelihood(adds h/2 or less), D normal with the variance seen so far

Who is acquitted is asked again when x rises by what batch may add (a cumulative sum), or after ten minutes.

Everything here is numbers in, numbers out, over rows that are lists of floats or rows of an array, so that numba
compiles the same source over many nodes (`decide/fleet.py`). Sources: Wald, Sequential Analysis (1947); Page,
Continuous inspection schemes (1954).
"""

from __future__ import annotations

import math

from colocate.model.special import incomplete_beta

Row = list[float]
Rows = list[list[float]]

# What is told of a subject each tick: its kind, the time of the reading, T, N, and the time it has waited (BestEffort).
KIND, SEEN_AT, SEEN_T, SEEN_N, SEEN_WAITED, SILENT, SUBJECT_INPUTS = 0, 1, 2, 3, 4, 5, 6
WAITING, LATENCY, DISPLACED = 0.0, 1.0, 2.0
# SILENT: 0 it answers; 1 its histogram is silent; 2 it is silent, and was past its target when it last answered.

# What is remembered of a subject. Times are monotonic seconds; NEVER means none.
#   AT, T, N, WAITED         the latest reading; NEAR_ the one a second before, OLD_ and OLDER_ those of its window
#   FROM_                    the reading from which this phase is measured (its settling is left out)
#   CHANGES, ADDED_SUM, ADDED_SQUARES   differences between neighbouring phases, LAST the level of the phase before
#   ON, ON_SUM, OFF, OFF_SUM phases of each kind and the sums of their levels; EXPOSURE of all of them
#   UNHEARD                  phases in which nothing was felt; FIRST_OFF the level of the first phase at the floor
#   CLEARED_UNTIL, CLEARED_AT, CLEARED_ON   how long it stays acquitted, its level then, its level beside batch
#   ACQUITTALS, RISEN        how often it was acquitted, and Page's sum since (else whether it suffered when it was read
#                            last); LEVEL what it feels now
#   ADDED, VARIANCE, CERTAINTY   D, of one change, and L; ALARMED it suffers; WINDOW seconds over which it is judged
(AT, T, N, WAITED, NEAR_AT, NEAR_T, NEAR_N, NEAR_WAITED, OLD_AT, OLD_T, OLD_N, OLDER_AT, OLDER_T, OLDER_N,
 FROM_AT, FROM_T, FROM_N, CHANGES, ADDED_SUM, ADDED_SQUARES, LAST, ON, ON_SUM, OFF, OFF_SUM, EXPOSURE, UNHEARD,
 FIRST_OFF, ASKED, CLEARED_UNTIL, CLEARED_AT, CLEARED_ON, ACQUITTALS, RISEN, LEVEL, ADDED, VARIANCE, CERTAINTY, ALARMED,
 WINDOW, SUBJECT_STATE) = range(41)  # fmt: skip
NEVER = -1.0
# ASKED: 0 not suspected, 1 batch is asked about it, 2 batch was found to harm it.

# What is fed in of the node each tick.
(NOW, BATCH_CORES, IN_FORCE, RAIL_CORES, NODE_CORES, IDLE_CPUS, FLOOR_CORES, QUESTION_SECONDS, HOLD_SECONDS,
 PRESSURE_RATIO, BESTEFFORT_RATIO, OPEN_BATCH_CORES, NODE_INPUTS) = range(13)  # fmt: skip
# The last one is filled in here: what batch uses when it is open.

ERROR_BUDGET_RATIO = 0.01
"""Of requests beyond the target of a p99."""
ALARM_LEVEL, HARM_LEVEL = 0.002, 0.02
"""A share of requests beyond the target is believed to be over its budget, or more than without batch, if chance gives
it less often than this. The first is looked for all the time, so that chance has many occasions."""
NEAR_SECONDS = 1.0
LEAST_ROOM_RATIO = 0.5
"""Of what a service may wait: what batch may add to one that waits as much by itself. With a quarter, services with
short bursts of their own starved batch: in a second without batch their room is measured too small."""
LEAST_DISPLACED_CORES = 0.015
MOST_DISPLACED_RATIO = 0.25
"""Of BestEffort's CPU, however much batch would have to give up."""
LEAST_SECONDS = 0.4
"""What is felt in less than this is not judged."""
MOST_CHANGES, MOST_CHANGES_OF_LATENCY = 12.0, 40.0
FINE_RATIO = 1.0 / 2.0
MOST_CHANGE = 4.0
SHORT_PHASES = 3.0
"""How many short off phases it takes to say that harm outlasts them."""
MOST_UNHEARD = 4.0
CLEARED_SECONDS = 600.0
FADE_SECONDS = 60.0
MOST_ACQUITTALS = 8.0
"""Who was acquitted again and again varies much by itself: each time it takes twice as much to ask anew."""
RISEN_NATS, RISEN_LIMITS = 7.0, 2.0
"""When Page's sum says that an acquitted subject feels more. Of late requests it is a log likelihood ratio: once in
e^7 times by chance. Of time it is in units of h: four seconds with h more than when it was acquitted."""
OLD_REQUESTS = 50.0
MOST_WINDOW_SECONDS = 30.0


def new_subject(row: Row, seen: Row, window_seconds: float) -> None:
    """A subject that is met for the first time: `row` of SUBJECT_STATE numbers is filled."""
    for i in range(SUBJECT_STATE):
        row[i] = 0.0
    row[AT], row[T], row[N], row[WAITED] = seen[SEEN_AT], seen[SEEN_T], seen[SEEN_N], seen[SEEN_WAITED]
    row[NEAR_AT], row[NEAR_T], row[NEAR_N], row[NEAR_WAITED] = row[AT], row[T], row[N], row[WAITED]
    row[OLD_AT], row[OLD_T], row[OLD_N] = row[AT], row[T], row[N]
    row[OLDER_AT], row[OLDER_T], row[OLDER_N] = row[AT], row[T], row[N]
    row[FROM_AT], row[CLEARED_UNTIL], row[LEVEL], row[WINDOW] = NEVER, NEVER, NEVER, window_seconds


def binomial_tail(count: float, total: float, share: float) -> float:
    """P(K >= count) for K binomial, `total` trials of probability `share`; whole or interpolated counts."""
    if count <= 0.0:
        return 1.0
    return incomplete_beta(count, total - count + 1.0, share) if count <= total else 0.0


def over_budget(count: float, total: float) -> bool:
    """Whether so many of so many requests beyond the target are more than a service within its p99 shows by chance."""
    return count >= 2.5 and binomial_tail(count, total, ERROR_BUDGET_RATIO) < ALARM_LEVEL


def harm(kind: float, off: float, inputs: Row) -> float:
    """What batch may add to a subject that feels `off` without it.

    To one that waits more by itself than it may batch may add as much again: it is not what hurts there.
    Of BestEffort's CPU batch may take more where it would have to give up far more: nobody promised BestEffort
    anything, so a core of batch for a hundredth of one is no bargain.
    """
    if kind == WAITING:
        most = inputs[PRESSURE_RATIO]
        return most if off >= most else max(most - max(off, 0.0), LEAST_ROOM_RATIO * most)
    if kind == LATENCY:
        return ERROR_BUDGET_RATIO + max(off, 0.0) / 3.0
    bargain = min(inputs[BESTEFFORT_RATIO] * inputs[OPEN_BATCH_CORES], MOST_DISPLACED_RATIO * abs(off))
    return max(inputs[BESTEFFORT_RATIO] * abs(off), LEAST_DISPLACED_CORES, bargain)


def weigh(kind: float, row: Row, inputs: Row) -> None:
    """Fill ADDED (D), VARIANCE (of one change) and CERTAINTY (L) of a subject from the phases so far."""
    changes = row[CHANGES]
    if changes < 1.0:
        row[ADDED] = row[CERTAINTY] = 0.0
        return
    off = row[OFF_SUM] / max(row[OFF], 1.0)
    limit = harm(kind, off, inputs)
    expected = 2.0 * (0.2 * limit) ** 2
    if kind == LATENCY:  # the sampling error of shares of so many requests a phase, a quarter more for bursts
        phases = row[ON] + row[OFF]
        share = (row[ON_SUM] + row[OFF_SUM]) / phases
        requests = max(row[EXPOSURE], 1.0)
        share = min(max(share, 0.5 / requests), 1.0 - 0.5 / requests)
        expected = 1.25 * 2.0 * share * (1.0 - share) * phases / requests + 0.005**2
    row[ADDED] = row[ADDED_SUM] / changes
    spread = max(row[ADDED_SQUARES] - changes * row[ADDED] ** 2, 0.0)
    row[VARIANCE] = (2.0 * expected + spread) / (1.0 + changes)
    # a phase in the middle is in two differences, with opposite signs: n changes are worth (n + 1) / 2 independent ones
    most, least = max(row[ADDED], limit), min(row[ADDED], 0.5 * limit)
    gain = (row[ADDED] - least) ** 2 - (row[ADDED] - most) ** 2
    row[CERTAINTY] = 0.5 * gain / (row[VARIANCE] / (0.5 * (changes + 1.0)))


def felt_in(row: Row) -> tuple[float, float]:
    """What the subject has felt in this phase so far, and over which exposure; exposure 0 if nothing can be said."""
    if row[FROM_AT] == NEVER or row[N] <= row[FROM_N] or row[AT] - row[FROM_AT] < LEAST_SECONDS:
        return 0.0, 0.0
    exposure = row[N] - row[FROM_N]
    return (row[T] - row[FROM_T]) / exposure, exposure


def begin_measuring(row: Row) -> None:
    """What is felt from the latest reading on belongs to this phase."""
    row[FROM_AT], row[FROM_T], row[FROM_N] = row[AT], row[T], row[N]


def forget_before(row: Row) -> None:
    """Samples from before a change of the grant never judge what holds after it."""
    row[NEAR_AT], row[NEAR_T], row[NEAR_N], row[NEAR_WAITED] = row[AT], row[T], row[N], row[WAITED]
    row[OLD_AT], row[OLD_T], row[OLD_N] = row[AT], row[T], row[N]
    row[OLDER_AT], row[OLDER_T], row[OLDER_N] = row[AT], row[T], row[N]


def take_in(row: Row, seen: Row, inputs: Row) -> None:
    """A new reading: what was felt lately, and whether that is an alarm (ALARMED)."""
    row[ALARMED] = 0.0
    if seen[SEEN_AT] <= row[AT]:
        return
    step, more, further = seen[SEEN_AT] - row[AT], seen[SEEN_T] - row[T], seen[SEEN_N] - row[N]
    row[AT], row[T], row[N], row[WAITED] = seen[SEEN_AT], seen[SEEN_T], seen[SEEN_N], seen[SEEN_WAITED]
    kind, lately = seen[KIND], row[AT] - row[NEAR_AT]
    count, exposure = row[T] - row[NEAR_T], row[N] - row[NEAR_N]
    if lately >= LEAST_SECONDS and exposure > 0.0:
        row[LEVEL] = count / exposure
        if kind == WAITING:
            alarm = row[LEVEL] > inputs[PRESSURE_RATIO]
        elif kind == LATENCY:
            alarm = over_budget(count, exposure) or over_budget(row[T] - row[OLDER_T], row[N] - row[OLDER_N])
        else:
            alarm = (row[WAITED] - row[NEAR_WAITED]) / lately > inputs[BESTEFFORT_RATIO]
        row[ALARMED] = 1.0 if alarm else 0.0
        if row[CLEARED_UNTIL] == NEVER:
            row[RISEN] = row[ALARMED]
    if row[CLEARED_UNTIL] != NEVER and further > 0.0:
        _still_cleared(row, kind, more, further, step, inputs)
    if row[CLEARED_UNTIL] != NEVER:
        row[ALARMED] = 0.0
    if lately >= NEAR_SECONDS - 1e-6:
        row[NEAR_AT], row[NEAR_T], row[NEAR_N], row[NEAR_WAITED] = row[AT], row[T], row[N], row[WAITED]
    aged = row[AT] - row[OLD_AT]
    if aged >= MOST_WINDOW_SECONDS or (aged >= row[WINDOW] and row[N] - row[OLD_N] >= OLD_REQUESTS):
        row[OLDER_AT], row[OLDER_T], row[OLDER_N] = row[OLD_AT], row[OLD_T], row[OLD_N]
        row[OLD_AT], row[OLD_T], row[OLD_N] = row[AT], row[T], row[N]


def _still_cleared(row: Row, kind: float, count: float, exposure: float, step: float, inputs: Row) -> None:
    """An acquittal ends when the level rises by what batch may add: Page's cumulative sum of the excess."""
    limit = harm(kind, row[CLEARED_AT], inputs)
    level = count / exposure
    if kind == LATENCY:
        low = min(max(row[CLEARED_AT], 0.5 * ERROR_BUDGET_RATIO), 1.0 - 1e-6)
        high = min(row[CLEARED_AT] + limit, 1.0 - 1e-9)
        gain = count * math.log(high / low) + (exposure - count) * math.log((1.0 - high) / (1.0 - low))
        row[RISEN] = max(row[RISEN] + gain, 0.0)
        over = row[RISEN] > RISEN_NATS * row[ACQUITTALS] and high > low
    else:
        row[RISEN] = max(row[RISEN] + count - (row[CLEARED_AT] + 0.5 * limit) * exposure, 0.0)
        over = row[RISEN] > RISEN_LIMITS * limit * row[ACQUITTALS]
    if level < row[CLEARED_AT]:  # its load falls: so does what is called its own
        row[CLEARED_AT] += (level - row[CLEARED_AT]) * (1.0 - math.exp(-step / FADE_SECONDS))
    if over or row[AT] >= row[CLEARED_UNTIL]:
        row[CLEARED_UNTIL] = NEVER


def fold(row: Row, kind: float, on: bool, inputs: Row) -> None:
    """A phase is over: its level joins those of its kind, and its difference to the phase before."""
    felt, exposure = felt_in(row)
    if exposure <= 0.0:  # it has no requests any more, or cannot be read: nobody can be asked about it for ever
        row[UNHEARD] += 1.0
        if row[UNHEARD] >= MOST_UNHEARD and row[ASKED] == 1.0:
            row[ASKED] = 0.0
        return
    if row[ON] + row[OFF] >= 1.0:
        limit = harm(kind, row[OFF_SUM] / max(row[OFF], 1.0), inputs)
        added = felt - row[LAST] if on else row[LAST] - felt
        if kind != LATENCY:  # one leap of its own must not decide
            added = min(max(added, -MOST_CHANGE * limit), MOST_CHANGE * limit)
        row[CHANGES] += 1.0
        row[ADDED_SUM] += added
        row[ADDED_SQUARES] += added * added
    elif not on:
        row[FIRST_OFF] = felt
    row[LAST] = felt
    row[EXPOSURE] += exposure
    if on:
        row[ON] += 1.0
        row[ON_SUM] += felt
    else:
        row[OFF] += 1.0
        row[OFF_SUM] += felt
    weigh(kind, row, inputs)


def harmed(row: Row, kind: float, inputs: Row) -> bool:
    """Whether what is felt in this phase is beyond what batch may add to the off phases."""
    felt, exposure = felt_in(row)
    if exposure <= 0.0 or row[OFF] < 1.0:
        return False
    off = row[OFF_SUM] / row[OFF]
    limit = harm(kind, off, inputs)
    if kind != LATENCY:  # who varies much by itself is not judged by one moment
        limit = max(limit, 2.0 * math.sqrt(row[VARIANCE]))
    if kind == WAITING:  # nor is who has little room: a phase tells
        limit = max(limit, inputs[PRESSURE_RATIO])
    if felt <= off + limit:
        return False
    if kind == LATENCY:
        share = min(max(off, ERROR_BUDGET_RATIO), 0.999)
        return binomial_tail(felt * exposure, exposure, share) < HARM_LEVEL
    return True


def clear(row: Row, at: float, level: float) -> None:
    """Acquit batch of what this subject feels, for a while; `level` is what it feels beside batch."""
    row[ASKED], row[ALARMED], row[RISEN] = 0.0, 0.0, 0.0
    lately = row[ACQUITTALS] > 0.0 and at - row[CLEARED_ON] < CLEARED_SECONDS
    row[ACQUITTALS] = min(2.0 * row[ACQUITTALS], MOST_ACQUITTALS) if lately else 1.0
    row[CLEARED_AT] = max(level, row[CLEARED_AT]) if lately else level
    row[CLEARED_ON], row[CLEARED_UNTIL] = at, at + CLEARED_SECONDS


def asked_enough(row: Row, kind: float, inputs: Row) -> bool:
    """Whether the likelier answer has to do.

    Of latency once D is known to half of h, so that what is left open is whether batch adds a little more or less
    than it may; where requests are few that takes longer.
    """
    changes = row[CHANGES]
    if kind != LATENCY or changes < MOST_CHANGES:
        return changes >= MOST_CHANGES
    error = FINE_RATIO * harm(kind, row[OFF_SUM] / max(row[OFF], 1.0), inputs)
    return changes >= MOST_CHANGES_OF_LATENCY or row[VARIANCE] <= error * error * 0.5 * (changes + 1.0)


def outlasts(row: Row, on: float) -> bool:
    """Whether the short off phases feel like those beside batch rather than like the end of the whole one before."""
    short = row[OFF] - 1.0
    return short >= SHORT_PHASES and (row[OFF_SUM] - row[FIRST_OFF]) / short - row[FIRST_OFF] > 0.5 * (
        on - row[FIRST_OFF]
    )
