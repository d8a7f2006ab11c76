"""What does batch add to what a service feels, and how sure is that? One estimator for waiting, latency and CPU taken.

A *subject* is a service, or BestEffort. What it feels is a cumulative series, harm T over exposure N: between two
readings it felt x = (T2 - T1) / (N2 - N1), whatever happened between and however often it was sampled.

- waiting: T is the time in which it waited for a CPU, N is time;
- latency: T is the number of requests beyond the target, N is the number of requests;
- displaced (BestEffort): T is minus its CPU time, N is time.

When a subject suffers, batch goes to its floor at once and is asked: phases with batch at its floor ("off") and open
("on") follow each other, and one pulse serves all subjects. Each change gives one difference of neighbours, so that
what changes slowly by itself cancels. Lengths are drawn by a hash, so that no load can keep step with them.

    D = mean of x(on) - x(off)          h = what batch may add (`harm`)
    L = log likelihood(adds h or more) - log likelihood(adds h/2 or less), D normal with the variance seen so far

L >= ln 19 after an off phase condemns, L <= -ln 19 after an on phase acquits (Wald's bounds at 5 %). Pulses are short,
a third of the question; but harm may outlast a short one (a cache). So the first off phase is a whole question long,
and where the answer of short pulses disagrees with what was felt at its end, whole questions are asked instead.

Who is acquitted is asked again when x rises by what batch may add (a cumulative sum), or after ten minutes. Who is
condemned has a small grant; more is tried, step by step, after a hold that doubles with each failure, and a step that
harms is taken back at the first look.

Everything here is numbers in, numbers out, over rows that are lists of floats or rows of an array, so that numba
compiles the same source over many nodes (`decide/fleet.py`). The design is designs/0001-cpu.md. Sources: Wald,
Sequential Analysis (1947); Page, Continuous inspection schemes (1954); Bubble-Flux (ISCA 2013) and CPI2 (EuroSys 2013),
which pulse and cap to learn.
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
#   ACQUITTALS, RISEN        how often it was acquitted, and Page's sum since; LEVEL what it feels now
#   ADDED, VARIANCE, CERTAINTY   D, of one change, and L; ALARMED it suffers; WINDOW seconds over which it is judged
(AT, T, N, WAITED, NEAR_AT, NEAR_T, NEAR_N, NEAR_WAITED, OLD_AT, OLD_T, OLD_N, OLDER_AT, OLDER_T, OLDER_N,
 FROM_AT, FROM_T, FROM_N, CHANGES, ADDED_SUM, ADDED_SQUARES, LAST, ON, ON_SUM, OFF, OFF_SUM, EXPOSURE, UNHEARD,
 FIRST_OFF, ASKED, CLEARED_UNTIL, CLEARED_AT, CLEARED_ON, ACQUITTALS, RISEN, LEVEL, ADDED, VARIANCE, CERTAINTY, ALARMED,
 WINDOW, SUBJECT_STATE) = range(41)  # fmt: skip
NEVER = -1.0
# ASKED: 0 not suspected, 1 batch is asked about it, 2 batch was found to harm it.

# What is remembered of the node.
#   MODE, UNTIL, MARK        what is done now, until when it lasts at least, and from when it is measured
#   GRANT, BEFORE, HOLD      cores in force, those before the last step, and how long they stand
#   ELSEWHERE                1 batch is confined to the CPUs that were idle; -1 it was, and is tried without; 0 neither
#   TRIED_ELSEWHERE          whether that was tried since the last question; PHASES counts, so that lengths can be drawn
#   WHOLE, WHOLE_AT          this question asks whole ones; when the last whole first phase was
#   OPEN_CORES, OPEN_AT      what batch uses when nothing limits it, and when that was seen
(MODE, UNTIL, MARK, GRANT, BEFORE, HOLD, PHASES, ELSEWHERE, TRIED_ELSEWHERE, WHOLE, WHOLE_AT, REASON, WHO, SINCE,
 OPEN_CORES, OPEN_AT, NODE_STATE) = range(17)  # fmt: skip
OPEN, ASKING_OFF, ASKING_ON, HELD, TRYING = 0.0, 1.0, 2.0, 3.0, 4.0
UNLIMITED = -1.0
"""Of a grant: none in force."""

# What is fed in of the node each tick.
(NOW, BATCH_CORES, IN_FORCE, RAIL_CORES, NODE_CORES, IDLE_CPUS, FLOOR_CORES, QUESTION_SECONDS, HOLD_SECONDS,
 PRESSURE_RATIO, BESTEFFORT_RATIO, OPEN_BATCH_CORES, NODE_INPUTS) = range(13)  # fmt: skip
# The last one is filled in here: what batch uses when it is open.

# Why it is as it is.
NOTHING_SUFFERS, BATCH_IDLE, NOT_CAUSED, ASKED_NOW, CAUSED, TRYING_MORE, SIGNAL_LOST = range(7)

ODDS = math.log(19.0)
ERROR_BUDGET_RATIO = 0.01
"""Of requests beyond the target of a p99."""
UNDECIDED = 0.5
"""After the last question the likelier answer has to do; below this it is that batch is innocent."""
ALARM_LEVEL, HARM_LEVEL = 0.002, 0.02
"""A share of requests beyond the target is believed to be over its budget, or more than without batch, if chance gives
it less often than this. The first is looked for all the time, so that chance has many occasions."""
SETTLE_SHARE = 2.0 / 3.0
NEAR_SECONDS = 1.0
LEAST_DISPLACED_CORES = 0.015
MOST_DISPLACED_RATIO = 0.25
"""Of BestEffort's CPU, however much batch would have to give up."""
LEAST_SECONDS = 0.4
"""What is felt in less than this is not judged."""
MOST_CHANGES, MOST_CHANGES_OF_LATENCY = 12.0, 40.0
MOST_PHASE_SECONDS, MOST_STEP_SECONDS = 10.0, 60.0
MOST_CHANGE = 4.0
SHORT_PHASES = 3.0
"""How many short off phases it takes to say that harm outlasts them."""
MOST_UNHEARD = 4.0
LOST_SECONDS = 600.0
"""How long a service that went silent keeps batch at its floor; then its waiting has to tell."""
LEAST_REQUESTS, LEAST_REQUESTS_TO_GROW = 20.0, 100.0
CLEARED_SECONDS = 600.0
FADE_SECONDS = 60.0
WHOLE_EVERY_SECONDS = 120.0
"""How often the first off phase of a question is a whole one."""
MOST_ACQUITTALS = 8.0
"""Who was acquitted again and again varies much by itself: each time it takes twice as much to ask anew."""
RISEN_NATS, RISEN_LIMITS = 7.0, 2.0
"""When Page's sum says that an acquitted subject feels more. Of late requests it is a log likelihood ratio: once in
e^7 times by chance. Of time it is in units of h: four seconds with h more than when it was acquitted."""
MOST_HOLD_SECONDS = 240.0
HOLD_PER_FAILED_SECOND = 30.0
STEP = 3.0
NOISE_CORES = 0.1
"""What batch uses above its floor without anybody gaining from taking it away."""
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


def new_node(node: Row, hold_seconds: float) -> None:
    """A node of which nothing is known: `node` of NODE_STATE numbers is filled."""
    for i in range(NODE_STATE):
        node[i] = 0.0
    node[GRANT], node[BEFORE], node[HOLD], node[WHO] = UNLIMITED, UNLIMITED, hold_seconds, -1.0
    node[WHOLE_AT] = NEVER


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

    Of BestEffort's CPU batch may take more where it would have to give up far more: nobody promised BestEffort
    anything, so a core of batch for a hundredth of one is no bargain.
    """
    if kind == WAITING:
        return inputs[PRESSURE_RATIO]
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


def _felt(row: Row) -> tuple[float, float]:
    """What the subject has felt in this phase so far, and over which exposure; exposure 0 if nothing can be said."""
    if row[FROM_AT] == NEVER or row[N] <= row[FROM_N] or row[AT] - row[FROM_AT] < LEAST_SECONDS:
        return 0.0, 0.0
    exposure = row[N] - row[FROM_N]
    return (row[T] - row[FROM_T]) / exposure, exposure


def _begin_measuring(row: Row) -> None:
    row[FROM_AT], row[FROM_T], row[FROM_N] = row[AT], row[T], row[N]


def _forget_before(row: Row) -> None:
    """Samples from before a change of the grant never judge what holds after it."""
    row[NEAR_AT], row[NEAR_T], row[NEAR_N], row[NEAR_WAITED] = row[AT], row[T], row[N], row[WAITED]
    row[OLD_AT], row[OLD_T], row[OLD_N] = row[AT], row[T], row[N]
    row[OLDER_AT], row[OLDER_T], row[OLDER_N] = row[AT], row[T], row[N]


def _take_in(row: Row, seen: Row, inputs: Row) -> None:
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


def _fold(row: Row, kind: float, on: bool, inputs: Row) -> None:
    """A phase is over: its level joins those of its kind, and its difference to the phase before."""
    felt, exposure = _felt(row)
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


def _harmed(row: Row, kind: float, inputs: Row) -> bool:
    """Whether what is felt in this phase is beyond what batch may add to the off phases."""
    felt, exposure = _felt(row)
    if exposure <= 0.0 or row[OFF] < 1.0:
        return False
    off = row[OFF_SUM] / row[OFF]
    limit = harm(kind, off, inputs)
    if kind != LATENCY:  # who varies much by itself is not judged by one moment
        limit = max(limit, 2.0 * math.sqrt(row[VARIANCE]))
    if felt <= off + limit:
        return False
    if kind == LATENCY:
        share = min(max(off, ERROR_BUDGET_RATIO), 0.999)
        return binomial_tail(felt * exposure, exposure, share) < HARM_LEVEL
    return True


def _length(node: Row, inputs: Row) -> float:
    """How long the next phase is: a short pulse or a whole question, up to a third longer by a hash of its number."""
    hashed = (int(node[PHASES]) * 2654435761) % 4294967296
    seconds = inputs[QUESTION_SECONDS] * (1.0 if node[WHOLE] > 0.0 else 1.0 / 3.0)
    return seconds * (1.0 + hashed / 4294967296.0 / 3.0)


def _go(node: Row, rows: Rows, mode: float, grant: float, start: float, seconds: float) -> None:
    """Enter a mode: `start` is the scheduled time, so that late looks do not add up."""
    node[MODE], node[GRANT], node[SINCE] = mode, grant, start
    node[UNTIL] = start + seconds
    node[MARK] = start + (SETTLE_SHARE * seconds if node[WHOLE] > 0.0 and mode == ASKING_OFF else 0.0)
    for row in rows:
        row[FROM_AT] = NEVER
        _forget_before(row)
        if mode in (ASKING_ON, TRYING):
            _begin_measuring(row)


def _ask(node: Row, rows: Rows, inputs: Row, start: float) -> None:
    """Protect first, and ask: batch at its floor. What was answered before is forgotten."""
    node[ELSEWHERE] = 0.0
    for row in rows:
        if row[ALARMED] > 0.0 and row[ASKED] == 0.0:
            row[ASKED] = 1.0
    _first_off(node, rows, inputs, start)


def _first_off(node: Row, rows: Rows, inputs: Row, start: float) -> None:
    node[PHASES] += 1.0
    for row in rows:
        for i in range(CHANGES, FIRST_OFF + 1):
            row[i] = 0.0
    asked_whole = node[WHOLE]
    if node[WHOLE_AT] == NEVER or start - node[WHOLE_AT] >= WHOLE_EVERY_SECONDS:
        node[WHOLE], node[WHOLE_AT] = 1.0, start
    seconds = inputs[QUESTION_SECONDS] if node[WHOLE] > 0.0 else _length(node, inputs)
    _go(node, rows, ASKING_OFF, inputs[FLOOR_CORES], start, seconds)
    node[WHOLE] = asked_whole


def _open(node: Row, rows: Rows, start: float) -> None:
    node[ELSEWHERE] = node[TRIED_ELSEWHERE] = node[WHOLE] = 0.0
    for row in rows:
        row[ASKED] = 0.0
    _go(node, rows, OPEN, UNLIMITED, start, 0.0)


def _hold(node: Row, rows: Rows, grant: float, start: float, failed_seconds: float) -> None:
    """Stay with a grant for the hold, which doubles with each failure; a slow one may not be repeated soon."""
    seconds = max(node[HOLD], HOLD_PER_FAILED_SECOND * failed_seconds)
    _go(node, rows, HELD, grant, start, seconds)
    node[HOLD] = min(2.0 * node[HOLD], MOST_HOLD_SECONDS)


def _clear(row: Row, at: float, level: float) -> None:
    row[ASKED], row[ALARMED], row[RISEN] = 0.0, 0.0, 0.0
    lately = row[ACQUITTALS] > 0.0 and at - row[CLEARED_ON] < CLEARED_SECONDS
    row[ACQUITTALS] = min(2.0 * row[ACQUITTALS], MOST_ACQUITTALS) if lately else 1.0
    row[CLEARED_AT] = max(level, row[CLEARED_AT]) if lately else level
    row[CLEARED_ON], row[CLEARED_UNTIL] = at, at + CLEARED_SECONDS


def _worst(rows: Rows, asked: float) -> int:
    """The subject to name: of those with ASKED at least `asked`, the one that batch adds most to; else none (-1)."""
    found, most = -1, 0.0
    for i in range(len(rows)):
        if rows[i][ASKED] >= asked and (found < 0 or rows[i][CERTAINTY] > most):
            found, most = i, rows[i][CERTAINTY]
    return found


def _measured(rows: Rows, seen: Rows, now: float, until: float, least_requests: float, most_seconds: float) -> bool:
    """Whether every subject that is asked about was measured in this phase; few requests take longer."""
    for i in range(len(rows)):
        if rows[i][ASKED] > 0.0:
            _, exposure = _felt(rows[i])
            wanted = least_requests if seen[i][KIND] == LATENCY else LEAST_SECONDS
            if exposure < wanted and now < until + most_seconds:
                return False
    return True


def _after_off(node: Row, rows: Rows, seen: Rows, inputs: Row) -> None:
    """The end of an off phase: condemn, or open and compare."""
    until, condemned, asked = node[UNTIL], False, False
    for i in range(len(rows)):
        row = rows[i]
        _fold(row, seen[i][KIND], False, inputs)
        if row[ASKED] > 0.0 and (
            (row[CERTAINTY] >= ODDS and (row[ON] >= 2.0 or seen[i][KIND] == DISPLACED))
            or (_asked_enough(row, seen[i][KIND]) and row[CERTAINTY] > UNDECIDED)
        ):
            row[ASKED], condemned = 2.0, True
        asked = asked or row[ASKED] > 0.0
    if not asked:
        _open(node, rows, until)
        return
    if condemned:
        for row in rows:
            row[ASKED] = 0.0 if row[ASKED] < 2.0 else 2.0
        node[TRIED_ELSEWHERE] = 0.0
        if node[WHOLE] > 0.0:  # harm that outlasts batch costs more each time that more is tried
            node[HOLD] = max(node[HOLD], 2.0 * inputs[HOLD_SECONDS])
        _hold(node, rows, inputs[FLOOR_CORES], until, 0.0)
        return
    node[PHASES] += 1.0
    _go(node, rows, ASKING_ON, UNLIMITED, until, _length(node, inputs))


def _asked_enough(row: Row, kind: float) -> bool:
    """Whether the likelier answer has to do."""
    return row[CHANGES] >= (MOST_CHANGES_OF_LATENCY if kind == LATENCY else MOST_CHANGES)


def _outlasts(row: Row, on: float) -> bool:
    """Whether the short off phases feel like those beside batch rather than like the end of the whole one before."""
    short = row[OFF] - 1.0
    return short >= SHORT_PHASES and (row[OFF_SUM] - row[FIRST_OFF]) / short - row[FIRST_OFF] > 0.5 * (
        on - row[FIRST_OFF]
    )


def _after_on(node: Row, rows: Rows, seen: Rows, inputs: Row, at: float) -> None:
    """The end of an on phase: acquit whom the answer is clear of; ask again for the others."""
    left, disagree, outlasts = False, False, False
    for i in range(len(rows)):
        row = rows[i]
        _fold(row, seen[i][KIND], True, inputs)
        if row[ASKED] == 0.0:
            continue
        felt, off = row[ON_SUM] / max(row[ON], 1.0), row[OFF_SUM] / max(row[OFF], 1.0)
        limit = harm(seen[i][KIND], off, inputs)
        differs = felt - row[FIRST_OFF] > max(0.75 * limit, 1.5 * math.sqrt(row[VARIANCE]))
        if node[WHOLE] == 0.0 and differs and _outlasts(row, felt):
            outlasts = True
            break
        if row[CERTAINTY] > -ODDS and not (_asked_enough(row, seen[i][KIND]) and row[CERTAINTY] <= UNDECIDED):
            left = True
        elif node[WHOLE] == 0.0 and differs:
            disagree = True
        else:
            _clear(row, at, felt)
    if outlasts or (not left and disagree):
        node[WHOLE] = 1.0
        _first_off(node, rows, inputs, at)
        return
    if not left:
        node[HOLD] = inputs[HOLD_SECONDS]
        _open(node, rows, at)
        return
    node[PHASES] += 1.0
    _go(node, rows, ASKING_OFF, inputs[FLOOR_CORES], at, _length(node, inputs))


def _while_open(node: Row, rows: Rows, inputs: Row) -> tuple[int, int]:
    alarmed, cleared = -1, -1
    for i in range(len(rows)):
        if rows[i][ALARMED] > 0.0 and (alarmed < 0 or rows[i][LEVEL] > rows[alarmed][LEVEL]):
            alarmed = i
        if rows[i][CLEARED_UNTIL] != NEVER and (cleared < 0 or rows[i][LEVEL] > rows[cleared][LEVEL]):
            cleared = i
    if alarmed >= 0 and inputs[BATCH_CORES] > inputs[FLOOR_CORES] + NOISE_CORES:
        _ask(node, rows, inputs, inputs[NOW])
        return ASKED_NOW, alarmed
    if alarmed >= 0:
        return BATCH_IDLE, alarmed
    return (NOT_CAUSED, cleared) if cleared >= 0 else (NOTHING_SUFFERS, -1)


def _while_asking(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    now, off = inputs[NOW], node[MODE] == ASKING_OFF
    for row in rows:
        if row[ALARMED] > 0.0 and row[ASKED] == 0.0:
            row[ASKED] = 1.0
        if off and row[FROM_AT] == NEVER and row[AT] >= node[MARK] - 1e-6 and inputs[IN_FORCE] > 0.0:
            _begin_measuring(row)
    who = _worst(rows, 1.0)
    if off and inputs[IN_FORCE] == 0.0 and now >= node[UNTIL] + MOST_STEP_SECONDS:
        for row in rows:  # a floor that is never in force answers nothing, and is not asked for again soon
            if row[ASKED] > 0.0:
                _clear(row, now, max(row[LEVEL], 0.0))
        _open(node, rows, now)
        return NOT_CAUSED, who
    if off:
        enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS, MOST_PHASE_SECONDS)
        if now >= node[UNTIL] - 1e-6 and inputs[IN_FORCE] > 0.0 and enough:
            node[UNTIL] = node[UNTIL] if now - node[UNTIL] < NEAR_SECONDS else now
            _after_off(node, rows, seen, inputs)
    else:
        for i in range(len(rows)):
            if rows[i][ASKED] > 0.0 and _harmed(rows[i], seen[i][KIND], inputs):
                # Its scheduled end counts, so that how often it is looked at moves no later phase.
                _after_on(node, rows, seen, inputs, max(node[UNTIL], now))
                return ASKED_NOW, who
        enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS, MOST_PHASE_SECONDS)
        if now >= node[UNTIL] - 1e-6 and enough:
            late = now - node[UNTIL] >= NEAR_SECONDS
            _after_on(node, rows, seen, inputs, now if late else node[UNTIL])
    if node[MODE] == HELD:
        return CAUSED, _worst(rows, 2.0)
    if node[MODE] == OPEN:
        return NOT_CAUSED, who
    return ASKED_NOW, who


def _while_held(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    now, floor = inputs[NOW], inputs[FLOOR_CORES]
    at_floor = node[GRANT] != UNLIMITED and node[GRANT] <= floor and node[ELSEWHERE] == 0.0
    who = _worst(rows, 2.0)
    for i in range(len(rows)):
        row = rows[i]
        if row[FROM_AT] == NEVER and row[AT] > node[SINCE]:
            _begin_measuring(row)
        if at_floor or row[ALARMED] == 0.0:
            continue
        if row[ASKED] < 2.0:  # somebody else suffers: a question of its own
            _ask(node, rows, inputs, now)
            return ASKED_NOW, i
        if _harmed(row, seen[i][KIND], inputs):
            node[ELSEWHERE] = 0.0
            _hold(node, rows, floor, now, 0.0)
            return CAUSED, i
    if now < node[UNTIL] - 1e-6:
        return CAUSED, who
    if at_floor:  # what is felt without batch today is what more is measured against
        for row in rows:
            felt, exposure = _felt(row)
            if exposure > 0.0:
                row[OFF], row[OFF_SUM] = 1.0, felt
    _try_more(node, rows, inputs, now)
    return TRYING_MORE, who


def _try_more(node: Row, rows: Rows, inputs: Row, start: float) -> None:
    """The next larger grant: CPUs that stay idle all the same, else three times as much, at the guard rail all."""
    node[BEFORE] = node[GRANT]
    if inputs[IDLE_CPUS] >= 1.0 and node[TRIED_ELSEWHERE] == 0.0:
        node[TRIED_ELSEWHERE] = node[ELSEWHERE] = 1.0
        grant = UNLIMITED
    else:
        rail = min(inputs[RAIL_CORES], 0.9 * inputs[NODE_CORES])
        grant = STEP * max(node[GRANT], inputs[FLOOR_CORES])
        if node[ELSEWHERE] > 0.0 or node[GRANT] >= rail:
            grant = UNLIMITED
        elif grant > rail:
            grant = rail
        if node[ELSEWHERE] > 0.0:
            node[ELSEWHERE] = -1.0  # tried without that confinement; back to it if that harms
    node[PHASES] += 1.0
    node[WHOLE] = 1.0
    _go(node, rows, TRYING, grant, start, _length(node, inputs))


def _taken_back(node: Row, rows: Rows, inputs: Row, start: float) -> None:
    since = node[SINCE]
    if node[ELSEWHERE] > 0.0:  # even there it harms: back to the ladder from the floor
        node[ELSEWHERE] = 0.0
        _go(node, rows, HELD, inputs[FLOOR_CORES], start, 0.0)
        return
    if node[ELSEWHERE] < 0.0:
        node[ELSEWHERE] = 1.0
    _hold(node, rows, node[BEFORE], start, math.ceil(inputs[NOW] - since - 1e-6))


def _while_trying(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    now, who = inputs[NOW], _worst(rows, 2.0)
    for i in range(len(rows)):
        row = rows[i]
        if row[ALARMED] > 0.0 and row[ASKED] < 2.0:
            _ask(node, rows, inputs, now)
            return ASKED_NOW, i
        if row[ASKED] == 2.0 and _harmed(row, seen[i][KIND], inputs):
            _taken_back(node, rows, inputs, max(node[UNTIL], now))
            return CAUSED, i
    enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS_TO_GROW, MOST_STEP_SECONDS)
    if now < node[UNTIL] - 1e-6 or not enough:
        return TRYING_MORE, who
    start = node[UNTIL] if now - node[UNTIL] < NEAR_SECONDS else now
    for i in range(len(rows)):
        row = rows[i]
        if row[ASKED] == 2.0 and row[OFF] >= 1.0:
            felt, exposure = _felt(row)
            off = row[OFF_SUM] / row[OFF]
            limit = harm(seen[i][KIND], off, inputs)
            if exposure > 0.0 and felt - off > 0.75 * limit:
                _taken_back(node, rows, inputs, start)
                return CAUSED, i
    if node[GRANT] == UNLIMITED and node[ELSEWHERE] <= 0.0:
        for row in rows:
            if row[ASKED] == 2.0:
                felt, _ = _felt(row)
                _clear(row, start, felt)
        node[HOLD] = inputs[HOLD_SECONDS]
        _open(node, rows, start)
        return NOT_CAUSED, who
    if node[ELSEWHERE] > 0.0:
        _hold(node, rows, UNLIMITED, start, 0.0)
        return CAUSED, who
    _try_more(node, rows, inputs, start)
    return TRYING_MORE, who


def _lost(rows: Rows, seen: Rows, now: float) -> int:
    """The subject whose histogram went silent while it did badly, or while it is asked about; -1 if none."""
    for i in range(len(rows)):
        if now - rows[i][AT] >= LOST_SECONDS:
            continue
        if seen[i][SILENT] >= 2.0 or (seen[i][SILENT] >= 1.0 and rows[i][ASKED] > 0.0):
            return i
    return -1


def resume(node: Row, rows: Rows, seen: Rows) -> None:
    """Another's rule was in force: what was felt then is forgotten, and a question under way is not answered."""
    for i in range(len(rows)):
        row = rows[i]
        row[AT], row[T], row[N] = seen[i][SEEN_AT], seen[i][SEEN_T], seen[i][SEEN_N]
        row[WAITED], row[FROM_AT], row[ALARMED] = seen[i][SEEN_WAITED], NEVER, 0.0
        _forget_before(row)
        if node[MODE] != HELD:
            row[ASKED] = 0.0
    if node[MODE] != HELD:
        _open(node, rows, row_time(rows))


def row_time(rows: Rows) -> float:
    """The time of the newest reading."""
    newest = 0.0
    for row in rows:
        newest = max(newest, row[AT])
    return newest


def _note_open(node: Row, inputs: Row) -> None:
    """What batch uses when nothing limits it: the most of lately."""
    if node[GRANT] == UNLIMITED:
        kept = node[OPEN_CORES] * 0.5 ** ((inputs[NOW] - node[OPEN_AT]) / FADE_SECONDS)
        node[OPEN_CORES], node[OPEN_AT] = max(inputs[BATCH_CORES], kept), inputs[NOW]
    inputs[OPEN_BATCH_CORES] = node[OPEN_CORES]


def step(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    """One look: `node` and `rows` (one a subject) are changed in place, `seen` (one a subject) and `inputs` are read.

    Returns the reason's code and the index of the subject to name, -1 for none.
    """
    _note_open(node, inputs)
    for i in range(len(rows)):
        _take_in(rows[i], seen[i], inputs)
    lost = _lost(rows, seen, inputs[NOW])
    if lost >= 0:  # losing sight of a patient is no recovery
        rows[lost][ASKED] = max(rows[lost][ASKED], 1.0)
        if node[MODE] != HELD or node[GRANT] == UNLIMITED or node[GRANT] > inputs[FLOOR_CORES]:
            node[ELSEWHERE] = 0.0
            _hold(node, rows, inputs[FLOOR_CORES], inputs[NOW], 0.0)
        node[UNTIL] = max(node[UNTIL], inputs[NOW] + NEAR_SECONDS)
        node[REASON], node[WHO] = SIGNAL_LOST, lost
        return SIGNAL_LOST, lost
    if node[REASON] == SIGNAL_LOST and node[MODE] == HELD and _worst(rows, 1.0) >= 0 and _worst(rows, 2.0) < 0:
        _ask(node, rows, inputs, inputs[NOW])  # it answers again, and nothing was found against batch: ask
    if node[MODE] == OPEN:
        reason, who = _while_open(node, rows, inputs)
    elif node[MODE] in (ASKING_OFF, ASKING_ON):
        reason, who = _while_asking(node, rows, seen, inputs)
    elif node[MODE] == HELD:
        reason, who = _while_held(node, rows, seen, inputs)
    else:
        reason, who = _while_trying(node, rows, seen, inputs)
    node[REASON], node[WHO] = reason, who
    return reason, who
