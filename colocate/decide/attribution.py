"""What does batch add to what a service feels, and how sure is that? One law for waiting, latency and CPU taken.

When a subject suffers, batch goes to its floor at once and is asked: phases with batch at its floor ("off") and open
("on") follow each other, and one pulse serves all subjects. Lengths are drawn by a hash, so that no load can keep step
with them. What the phases say is `evidence`'s: D, what batch adds, and L, how sure that is.

L >= ln 19 after an off phase condemns, L <= -ln 19 after an on phase acquits (Wald's bounds at 5 %). Pulses are short,
a third of the question; but harm may outlast a short one (a cache). So the first off phase is a whole question long,
and where the answer of short pulses disagrees with what was felt at its end, whole questions are asked instead.

Who is condemned has a small grant; more is tried, step by step, after a hold that doubles with each failure, and a step
that harms is taken back at the first look.

Numbers in, numbers out, as in `evidence`. The design is designs/0001-cpu.md. Sources: Bubble-Flux (ISCA 2013) and CPI2
(EuroSys 2013), which pulse and cap to learn.
"""

from __future__ import annotations

import math

from colocate.decide.evidence import (
    ALARMED,
    ASKED,
    AT,
    BATCH_CORES,
    CERTAINTY,
    CHANGES,
    CLEARED_UNTIL,
    DISPLACED,
    FADE_SECONDS,
    FIRST_OFF,
    FLOOR_CORES,
    FROM_AT,
    HOLD_SECONDS,
    IDLE_CPUS,
    IN_FORCE,
    KIND,
    LAST,
    LATENCY,
    LEAST_SECONDS,
    LEVEL,
    NEAR_SECONDS,
    NEVER,
    NODE_CORES,
    NOW,
    OFF,
    OFF_SUM,
    ON,
    ON_SUM,
    OPEN_BATCH_CORES,
    PRESSURE_RATIO,
    QUESTION_SECONDS,
    RAIL_CORES,
    RISEN,
    SEEN_AT,
    SEEN_N,
    SEEN_T,
    SEEN_WAITED,
    SILENT,
    VARIANCE,
    WAITED,
    WAITING,
    N,
    Row,
    Rows,
    T,
    asked_enough,
    begin_measuring,
    clear,
    felt_in,
    fold,
    forget_before,
    harm,
    harmed,
    outlasts,
    take_in,
)

# What is remembered of the node.
#   MODE, UNTIL, MARK        what is done now, until when it lasts at least, and from when it is measured
#   GRANT, BEFORE, HOLD      cores in force, those before the last step, and how long they stand
#   ELSEWHERE                1 batch is confined to the CPUs that were idle; -1 it was, and is tried without; 0 neither
#   TRIED_ELSEWHERE          whether that was tried since the last question; PHASES counts, so that lengths can be drawn
#   WHOLE, WHOLE_AT          this question asks whole ones; when the last whole first phase was
#   OPEN_CORES, OPEN_AT      what batch uses when nothing limits it, and when that was seen
#   PATIENCE, SPENT_AT       seconds for which batch may still yield to bursts, and when that was reckoned last
(MODE, UNTIL, MARK, GRANT, BEFORE, HOLD, PHASES, ELSEWHERE, TRIED_ELSEWHERE, WHOLE, WHOLE_AT, REASON, WHO, SINCE,
 OPEN_CORES, OPEN_AT, PATIENCE, SPENT_AT, NODE_STATE) = range(19)  # fmt: skip
OPEN, ASKING_OFF, ASKING_ON, HELD, TRYING, YIELDING = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
UNLIMITED = -1.0
"""Of a grant: none in force."""

# Why it is as it is.
NOTHING_SUFFERS, BATCH_IDLE, NOT_CAUSED, ASKED_NOW, CAUSED, TRYING_MORE, SIGNAL_LOST, BURSTS = range(8)

ODDS = math.log(19.0)
UNDECIDED = 0.5
"""After the last question the likelier answer has to do; below this it is that batch is innocent."""
SETTLE_SHARE = 2.0 / 3.0
MOST_PHASE_SECONDS, MOST_STEP_SECONDS = 10.0, 60.0
LOST_SECONDS = 600.0
"""How long a service that went silent keeps batch at its floor; then its waiting has to tell."""
LEAST_REQUESTS, LEAST_REQUESTS_TO_GROW = 20.0, 100.0
WHOLE_EVERY_SECONDS = 120.0
"""How often the first off phase of a question is a whole one."""
DOUBTED_SECONDS = 20.0
"""How long an acquittal holds of whom suffers still: it may be a burst of its own that hides what batch adds."""
MOST_HOLD_SECONDS = 240.0
PATIENCE_RATIO, LEAST_PATIENCE_SECONDS, MOST_PATIENCE_SECONDS = 0.01, 20.0, 600.0
"""Such a share of all time batch yields to what services wait by themselves, at most so long: who always waits by
itself must not starve it. With less than the least it is asked."""
AFTER_BURST_SECONDS = 60.0
HOLD_PER_FAILED_SECOND = 30.0
STEP = 3.0
NOISE_CORES = 0.1
"""What batch uses above its floor without anybody gaining from taking it away."""


def new_node(node: Row, hold_seconds: float) -> None:
    """A node of which nothing is known: `node` of NODE_STATE numbers is filled."""
    for i in range(NODE_STATE):
        node[i] = 0.0
    node[GRANT], node[BEFORE], node[HOLD], node[WHO] = UNLIMITED, UNLIMITED, hold_seconds, -1.0
    node[WHOLE_AT] = node[SPENT_AT] = NEVER


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
        forget_before(row)
        if mode in (ASKING_ON, TRYING):
            begin_measuring(row)


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


def _bursting(rows: Rows, seen: Rows, inputs: Row) -> int:
    """A service that waits too much; -1 if none."""
    for i in range(len(rows)):
        if seen[i][KIND] == WAITING and rows[i][LEVEL] > inputs[PRESSURE_RATIO]:
            return i
    return -1


def _yields(node: Row, rows: Rows, inputs: Row, start: float) -> bool:
    """Batch stays at its floor until a service's burst has been over for a while; not without patience."""
    if node[PATIENCE] < LEAST_PATIENCE_SECONDS:
        return False
    _go(node, rows, YIELDING, inputs[FLOOR_CORES], start, AFTER_BURST_SECONDS)
    return True


def _acquitted(node: Row, rows: Rows, seen: Rows, inputs: Row, start: float) -> None:
    """Open; but batch does not add to what a service waits in a burst of its own, as long as there is patience."""
    node[HOLD] = inputs[HOLD_SECONDS]
    _open(node, rows, start)
    for i in range(len(rows)):
        off = rows[i][OFF_SUM] / max(rows[i][OFF], 1.0)
        if seen[i][KIND] == WAITING and off > inputs[PRESSURE_RATIO] and _yields(node, rows, inputs, start):
            return


def _while_yielding(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    now, who = inputs[NOW], _bursting(rows, seen, inputs)
    over = who < 0 and now >= node[UNTIL] - 1e-6
    if who >= 0:
        node[UNTIL] = now + AFTER_BURST_SECONDS
    if not over and node[PATIENCE] > 0.0:
        return BURSTS, who
    for i in range(len(rows)):
        if over and seen[i][KIND] == WAITING:  # what was said of batch in that burst holds no longer
            rows[i][CLEARED_UNTIL] = NEVER
    condemned = _worst(rows, 2.0)
    if condemned >= 0:
        _go(node, rows, HELD, inputs[FLOOR_CORES], now, inputs[QUESTION_SECONDS])
        return CAUSED, condemned
    _open(node, rows, now)
    return _while_open(node, rows, inputs)


def _hold(node: Row, rows: Rows, grant: float, start: float, failed_seconds: float) -> None:
    """Stay with a grant for the hold, which doubles with each failure; a slow one may not be repeated soon."""
    seconds = max(node[HOLD], HOLD_PER_FAILED_SECOND * failed_seconds)
    _go(node, rows, HELD, grant, start, seconds)
    node[HOLD] = min(2.0 * node[HOLD], MOST_HOLD_SECONDS)


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
            _, exposure = felt_in(rows[i])
            wanted = least_requests if seen[i][KIND] == LATENCY else LEAST_SECONDS
            if exposure < wanted and now < until + most_seconds:
                return False
    return True


def _after_off(node: Row, rows: Rows, seen: Rows, inputs: Row) -> None:
    """The end of an off phase: condemn, or open and compare."""
    until, condemned, asked, bursts = node[UNTIL], False, False, True
    for i in range(len(rows)):
        row = rows[i]
        fold(row, seen[i][KIND], False, inputs)
        suffers = seen[i][KIND] == WAITING and row[LAST] > inputs[PRESSURE_RATIO]
        bursts = bursts and (row[ASKED] == 0.0 or (suffers and row[ON] == 0.0))
        if row[ASKED] > 0.0 and (
            (row[CERTAINTY] >= ODDS and (row[ON] >= 2.0 or seen[i][KIND] == DISPLACED))
            or (asked_enough(row, seen[i][KIND], inputs) and row[CERTAINTY] > UNDECIDED)
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
    if bursts and _yields(node, rows, inputs, until):
        return
    node[PHASES] += 1.0
    _go(node, rows, ASKING_ON, UNLIMITED, until, _length(node, inputs))


def _after_on(node: Row, rows: Rows, seen: Rows, inputs: Row, at: float) -> None:
    """The end of an on phase: acquit whom the answer is clear of; ask again for the others."""
    left, disagree, lasting = False, False, False
    for i in range(len(rows)):
        row = rows[i]
        fold(row, seen[i][KIND], True, inputs)
        if row[ASKED] == 0.0:
            continue
        felt, off = row[ON_SUM] / max(row[ON], 1.0), row[OFF_SUM] / max(row[OFF], 1.0)
        limit = harm(seen[i][KIND], off, inputs)
        differs = felt - row[FIRST_OFF] > max(0.75 * limit, 1.5 * math.sqrt(row[VARIANCE]))
        if node[WHOLE] == 0.0 and differs and outlasts(row, felt):
            lasting = True
            break
        if row[CERTAINTY] > -ODDS and not (asked_enough(row, seen[i][KIND], inputs) and row[CERTAINTY] <= UNDECIDED):
            left = True
        elif node[WHOLE] == 0.0 and differs:
            disagree = True
        else:
            clear(row, at, felt)
    if lasting or (not left and disagree):
        node[WHOLE] = 1.0
        _first_off(node, rows, inputs, at)
        return
    if not left:
        _acquitted(node, rows, seen, inputs, at)
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


def _give_up(node: Row, rows: Rows, now: float) -> None:
    """A floor that is never in force answers nothing, and is not asked for again soon."""
    for row in rows:
        if row[ASKED] > 0.0:
            clear(row, now, max(row[LEVEL], 0.0))
    _open(node, rows, now)


def _while_asking(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    now, off = inputs[NOW], node[MODE] == ASKING_OFF
    for row in rows:
        if row[ALARMED] > 0.0 and row[ASKED] == 0.0:
            row[ASKED] = 1.0
        if off and row[FROM_AT] == NEVER and row[AT] >= node[MARK] - 1e-6 and inputs[IN_FORCE] > 0.0:
            begin_measuring(row)
    who = _worst(rows, 1.0)
    if who < 0:  # whom it was about has gone, or is known to wait too shortly to feel it
        _open(node, rows, now)
        return NOTHING_SUFFERS, -1
    if off and inputs[IN_FORCE] == 0.0 and now >= node[UNTIL] + MOST_STEP_SECONDS:
        _give_up(node, rows, now)
        return NOT_CAUSED, who
    if off:
        enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS, MOST_PHASE_SECONDS)
        if now >= node[UNTIL] - 1e-6 and inputs[IN_FORCE] > 0.0 and enough:
            node[UNTIL] = node[UNTIL] if now - node[UNTIL] < NEAR_SECONDS else now
            _after_off(node, rows, seen, inputs)
    else:
        for i in range(len(rows)):
            if rows[i][ASKED] > 0.0 and harmed(rows[i], seen[i][KIND], inputs):
                # Its scheduled end counts, so that how often it is looked at moves no later phase.
                _after_on(node, rows, seen, inputs, max(node[UNTIL], now))
                return ASKED_NOW, who
        enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS, MOST_PHASE_SECONDS)
        if now >= node[UNTIL] - 1e-6 and enough:
            late = now - node[UNTIL] >= NEAR_SECONDS
            _after_on(node, rows, seen, inputs, now if late else node[UNTIL])
    if node[MODE] == YIELDING:
        return BURSTS, _bursting(rows, seen, inputs)
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
        # What it waits without batch is what it waited lately: a burst that is over since is no measure.
        lately = node[UNTIL] - inputs[HOLD_SECONDS]
        aged = at_floor and seen[i][KIND] == WAITING and row[FROM_AT] < lately <= row[AT]
        if row[AT] > node[SINCE] and (row[FROM_AT] == NEVER or aged):
            begin_measuring(row)
        if at_floor or row[ALARMED] == 0.0:
            continue
        if row[ASKED] < 2.0:  # somebody else suffers: a question of its own
            _ask(node, rows, inputs, now)
            return ASKED_NOW, i
        if harmed(row, seen[i][KIND], inputs):
            node[ELSEWHERE] = 0.0
            _hold(node, rows, floor, now, 0.0)
            return CAUSED, i
    if now < node[UNTIL] - 1e-6:
        return CAUSED, who
    if not at_floor and _suffers(rows, seen):  # what it felt without batch may have been a burst of its own: look again
        node[ELSEWHERE] = 0.0
        _go(node, rows, HELD, floor, now, inputs[QUESTION_SECONDS])
        return CAUSED, who
    bursting = _bursting(rows, seen, inputs) if at_floor else -1
    if bursting >= 0 and _yields(node, rows, inputs, now):
        return BURSTS, bursting
    if at_floor:  # what is felt without batch today is what more is measured against
        for row in rows:
            felt, exposure = felt_in(row)
            if exposure > 0.0:
                row[OFF], row[OFF_SUM] = 1.0, felt
    _try_more(node, rows, inputs, now)
    return TRYING_MORE, who


def _suffers(rows: Rows, seen: Rows) -> bool:
    """Whether a service that waits, and that batch was found to harm, suffers still.

    BestEffort may wait for itself. Of late requests batch may add the more the more there are: a burst hides less.
    """
    found = False
    for i in range(len(rows)):
        found = found or (rows[i][ASKED] == 2.0 and rows[i][RISEN] > 0.0 and seen[i][KIND] == WAITING)
    return found


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
        if row[ASKED] == 2.0 and harmed(row, seen[i][KIND], inputs):
            _taken_back(node, rows, inputs, max(node[UNTIL], now))
            return CAUSED, i
    enough = _measured(rows, seen, now, node[UNTIL], LEAST_REQUESTS_TO_GROW, MOST_STEP_SECONDS)
    if now < node[UNTIL] - 1e-6 or not enough:
        return TRYING_MORE, who
    start = node[UNTIL] if now - node[UNTIL] < NEAR_SECONDS else now
    for i in range(len(rows)):
        row = rows[i]
        if row[ASKED] == 2.0 and row[OFF] >= 1.0:
            felt, exposure = felt_in(row)
            off = row[OFF_SUM] / row[OFF]
            limit = harm(seen[i][KIND], off, inputs)
            if exposure > 0.0 and felt - off > 0.75 * limit:
                _taken_back(node, rows, inputs, start)
                return CAUSED, i
    if node[GRANT] == UNLIMITED and node[ELSEWHERE] <= 0.0:
        suffers = _suffers(rows, seen)
        for row in rows:
            if row[ASKED] == 2.0:
                felt, _ = felt_in(row)
                clear(row, start, felt)
                if suffers:  # as it did without batch when that was seen last, which may have been a burst of its own
                    row[CLEARED_UNTIL] = start + DOUBTED_SECONDS
        _acquitted(node, rows, seen, inputs, start)
        return (NOT_CAUSED, who) if node[MODE] == OPEN else (BURSTS, _bursting(rows, seen, inputs))
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
        forget_before(row)
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


def _spend(node: Row, inputs: Row) -> None:
    """Patience grows with time, and goes while batch yields."""
    passed = inputs[NOW] - node[SPENT_AT] if node[SPENT_AT] != NEVER else 0.0
    node[SPENT_AT] = inputs[NOW]
    yields = node[MODE] == YIELDING and inputs[IN_FORCE] > 0.0
    change = PATIENCE_RATIO * passed - (passed if yields else 0.0)
    node[PATIENCE] = min(max(node[PATIENCE] + change, 0.0), MOST_PATIENCE_SECONDS)


def step(node: Row, rows: Rows, seen: Rows, inputs: Row) -> tuple[int, int]:
    """One look: `node` and `rows` (one a subject) are changed in place, `seen` (one a subject) and `inputs` are read.

    Returns the reason's code and the index of the subject to name, -1 for none.
    """
    _note_open(node, inputs)
    _spend(node, inputs)
    for i in range(len(rows)):
        take_in(rows[i], seen[i], inputs)
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
    elif node[MODE] == YIELDING:
        reason, who = _while_yielding(node, rows, seen, inputs)
    else:
        reason, who = _while_trying(node, rows, seen, inputs)
    node[REASON], node[WHO] = reason, who
    return reason, who
