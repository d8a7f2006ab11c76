"""What is asked over HTTP, against real servers on loopback: a service's histogram, and the kubelet's pods."""

import asyncio
import contextlib
import socket
from typing import cast

import pytest
from aiohttp import web

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import find_tree, inodes_of
from colocate.kernelmodel import ModelKernel
from colocate.observe.cgroup import FilePages
from colocate.observe.latency import MAX_WANTED_BYTES, LatencyScraper
from colocate.observe.pods import Pod, PodLister, parse_pods
from colocate.observe.workloads import discover
from colocate.policy.schema import (
    BatchPolicy,
    KubeletPolicy,
    PolicySpec,
    Selector,
    ServiceLevelObjective,
    ServicePolicy,
)

HISTOGRAM = """# TYPE lat histogram
lat_bucket{code="200",le="0.01"} 90
lat_bucket{code="200",le="0.02"} 99
lat_bucket{code="200",le="+Inf"} 100
lat_bucket{code="500",le="0.01"} 1
lat_bucket{code="500",le="0.02"} 1
lat_bucket{code="500",le="+Inf"} 1
lat_sum{code="200"} 1
lat_count{code="200"} 100
"""
POD_LIST = b"""{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[
{"metadata":{"name":"web-7d4b","namespace":"shop","uid":"aaa-1","labels":{"app":"web","pod-template-hash":"7d4b"}},
 "spec":{"containers":[{"name":"c","image":"web"}]},"status":{"phase":"Running","qosClass":"Burstable"}},
{"metadata":{"name":"web-7d4b","namespace":"test","uid":"bbb-2","labels":{"app":"web"}},"spec":{},"status":{}},
{"metadata":{"name":"bare","namespace":"shop","uid":"ccc-3"},"spec":{},"status":{}}]}"""


@contextlib.asynccontextmanager
async def serving(answer):
    async def handle(request):
        return await answer(request) if asyncio.iscoroutinefunction(answer) else answer

    application = web.Application()
    application.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def scrape(url, times=1, **changes):
    scraper = LatencyScraper()
    slo = ServiceLevelObjective(**{"p99": 0.02, "url": f"{url}/metrics", "metric": "lat", **changes})
    try:
        for _ in range(times):
            await scraper.scrape({"web": slo}, 2.0)
    finally:
        await scraper.close()
    return scraper.readings.get("web"), scraper.problems.get("web", "")


async def test_the_series_of_a_histogram_are_added_up():
    async with serving(web.Response(text=HISTOGRAM)) as url:
        reading, problem = await scrape(url)
    assert reading.counts == (91.0, 100.0, 101.0)
    assert problem == ""


async def test_labels_choose_the_series():
    async with serving(web.Response(text=HISTOGRAM)) as url:
        reading, _ = await scrape(url, labels={"code": "200"})
    assert reading.counts == (90.0, 99.0, 100.0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param(web.Response(text="<html>hello lat_bucket{</html>"), "no histogram lat", id="HTML"),
        pytest.param(web.Response(text="up 1\n"), "no histogram lat with labels", id="another metric"),
        pytest.param(web.Response(text="lat 3\nlat_sum 3\n"), "no histogram lat", id="a summary, not a histogram"),
        pytest.param(web.Response(body=b"\xff\xfe\x00lat"), "no histogram lat", id="bytes"),
        pytest.param(web.Response(text="lat_bucket{le=\n"), "not Prometheus text", id="half a line"),
        pytest.param(web.Response(status=500), "HTTP status 500", id="an error"),
        pytest.param(
            web.Response(text="lat_bucket\n" * (MAX_WANTED_BYTES // 10 + MAX_WANTED_BYTES // 50)),
            "more than 8 MiB",
            id="far too much",
        ),
    ],
)
async def test_what_is_no_histogram_is_a_problem_that_says_why(answer, says):
    async with serving(answer) as url:
        reading, problem = await scrape(url)
    assert reading is None
    assert url in problem
    assert says in problem


async def test_a_slow_endpoint_is_given_up_after_its_timeout():
    async def never(_request):
        await asyncio.sleep(60)

    async with serving(never) as url:
        reading, problem = await scrape(url, scrape_timeout=0.1)
    assert reading is None
    assert "did not answer within 0.1 s" in problem


async def test_an_endpoint_that_is_down_is_a_problem():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        reading, problem = await scrape(f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert reading is None
    assert "onnect" in problem


@pytest.mark.parametrize(
    ("p99", "says"),
    [
        pytest.param(0.001, "no bucket boundary near the target 0.001 s", id="far from every one"),
        pytest.param(0.02, "", id="the highest one"),
        pytest.param(0.5, "no bucket boundary above the target 0.5 s", id="above all"),
    ],
)
async def test_a_target_for_which_p99_would_be_a_guess_is_warned_of(p99, says):
    async with serving(web.Response(text=HISTOGRAM)) as url:
        reading, problem = await scrape(url, p99=p99)
    assert reading is not None
    assert problem.startswith(says)
    assert bool(problem) == bool(says)


async def ask(kubelet):
    lister = PodLister()
    lister.refresh(kubelet)
    for _ in range(100):
        if lister.pods or lister.problem:
            break
        await asyncio.sleep(0.02)
    await lister.close()
    return lister


async def test_the_kubelet_is_asked_for_its_pods_with_the_token(tmp_path):
    (tmp_path / "token").write_text("secret\n")

    async def answer(request):
        allowed = request.headers.get("Authorization") == "Bearer secret" and request.path == "/pods"
        return web.Response(body=POD_LIST) if allowed else web.Response(status=401)

    async with serving(answer) as url:
        lister = await ask(KubeletPolicy(url=url, token_file=str(tmp_path / "token")))
        refused = await ask(KubeletPolicy(url=url, token_file=str(tmp_path / "none")))
    assert lister.pods["aaa-1"].labels["app"] == "web"
    assert lister.problem == ""
    assert "HTTP 401: its token may not read nodes/pods" in refused.problem


async def test_the_pods_of_a_full_node_are_read_whole():
    pods = [{"metadata": {"name": f"p{i}", "namespace": "n", "uid": f"u{i}"}, "spec": "x" * 8000} for i in range(110)]
    async with serving(web.json_response({"items": pods})) as url:
        lister = await ask(KubeletPolicy(url=url))
    assert len(lister.pods) == 110


@pytest.mark.parametrize(
    "body", [pytest.param(b"404 page not found", id="text"), pytest.param(b'{"items": 3}', id="another shape")]
)
async def test_an_answer_that_is_no_pod_list_is_a_problem(body):
    async with serving(web.Response(body=body)) as url:
        lister = await ask(KubeletPolicy(url=url))
    assert f"{url}/pods" in lister.problem
    assert not lister.pods


@pytest.mark.parametrize(
    ("labels", "namespace", "found"),
    [
        pytest.param({"app": "web"}, "shop", ["/kubepods/burstable/podaaa-1"], id="labels and namespace"),
        pytest.param(
            {"app": "web"}, None, ["/kubepods/burstable/podaaa-1", "/kubepods/besteffort/podbbb-2"], id="any namespace"
        ),
        pytest.param({"app": "web", "tier": "front"}, None, [], id="every label must match"),
    ],
)
def test_a_pod_selector_means_the_cgroups_of_matching_pods(labels, namespace, found):
    kernel = ModelKernel(version=2)
    for path in ("", "/burstable", "/besteffort", "/burstable/podaaa-1", "/besteffort/podbbb-2", "/burstable/podccc-3"):
        kernel.mkdir(UNIFIED, f"/kubepods{path}")

    def inodes(path, _main_inode=None):
        return inodes_of(kernel, path)

    selector = Selector(pod_selector=labels, namespace=namespace)
    spec = PolicySpec(services=(ServicePolicy(name="web", selector=selector),))
    targets, problems = discover(kernel, find_tree(kernel, "/"), spec, {}, inodes, parse_pods(POD_LIST))
    assert [t.path for t in targets if t.name.startswith("web")] == found
    assert ("web" in problems) == (not found)
    assert "shop/bare" in [t.name for t in targets]


def test_what_runs_the_cluster_is_never_chosen_as_batch():
    kernel = ModelKernel(version=2)
    for path in ("", "/burstable", "/besteffort", "/burstable/podaaa-1", "/besteffort/podbbb-2"):
        kernel.mkdir(UNIFIED, f"/kubepods{path}")
    pods = parse_pods(POD_LIST.replace(b'"namespace":"shop"', b'"namespace":"kube-system"'))
    spec = PolicySpec(batch=(BatchPolicy(name="low", selector=Selector(pod_selector={"app": "web"})),))
    targets, _ = discover(
        kernel, find_tree(kernel, "/"), spec, {}, lambda path, _inode=None: inodes_of(kernel, path), pods
    )
    tiers = {t.path: t.tier for t in targets}
    assert tiers["/kubepods/besteffort/podbbb-2"] == "batch"
    assert tiers["/kubepods/burstable/podaaa-1"] == "service"


def test_pods_without_labels_match_no_selector():
    assert not Pod("u", "n", "s", {}).matches({"app": "web"}, None)


@pytest.mark.parametrize(
    ("usage", "seconds", "inode", "stalled", "stands"),
    [
        pytest.param(6400, 1, 7, 0, True, id="nothing has changed"),
        pytest.param(6500, 4, 7, 0, True, id="usage has moved by a little"),
        pytest.param(6501, 1, 7, 0, False, id="usage has moved by more than a 64th"),
        pytest.param(6400, 1, 7, 9, False, id="it has stalled on memory since"),
        pytest.param(6400, 5, 7, 0, False, id="the reading is five seconds old"),
        pytest.param(6400, 1, 8, 0, False, id="another cgroup has the name now"),
    ],
)
def test_a_reading_of_file_pages_stands_for_a_while(
    usage: int, seconds: float, inode: int, stalled: int, stands: bool
) -> None:
    pages = FilePages()
    pages.keep("/x", 7, 6400, 0, 100, 40)
    pages.now = seconds
    assert pages.known("/x", inode, usage, stalled) == ((100, 40) if stands else None)
    pages.forget_others([])
    assert pages.known("/x", 7, 6400, 0) is None


class Files:
    """A cgroup's files (v1), and how often its throttling was read."""

    def __init__(self, quota: str) -> None:
        self.quota, self.throttled, self.reads = quota, 0, 0

    def read(self, hierarchy: str, path: str, file: str, inode: int | None = None) -> str | None:
        if file == "cpu.cfs_quota_us":
            return self.quota
        self.reads += 1
        return f"nr_periods 1\nnr_throttled 1\nthrottled_time {self.throttled}\n"


@pytest.mark.parametrize(
    ("quota", "reads"),
    [
        pytest.param("-1\n", 3, id="without a quota it stands still, and is seldom read"),
        pytest.param("50000\n", 12, id="with one it is read each time"),
    ],
)
def test_throttling_is_read_anew_where_it_may_have_grown(quota: str, reads: int) -> None:
    pages, files = FilePages(), Files(quota)
    for second in range(12):
        pages.now, files.throttled = float(second), 1000 * second * (not quota.startswith("-"))
        assert pages.throttled(cast("FilePort", files), "/x", "cpu", 7) == files.throttled
    assert files.reads == reads
    files.quota, pages.now = "50000\n", 100.0
    pages.throttled(cast("FilePort", files), "/x", "cpu", 7)
    pages.now, files.throttled = 100.5, 77
    assert pages.throttled(cast("FilePort", files), "/x", "cpu", 7) == 77, "it has got a quota since"


class Pressures:
    """The `some` of memory pressure files by path, and how often those of pods were read."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {"/pods": 5, "/pods/a": 2, "/pods/b": 3, "/other": 1}
        self.reads: list[str] = []

    def read(self, hierarchy: str, path: str, file: str, inode: int | None = None) -> str | None:
        assert file == "memory.pressure"
        if path != "/pods":
            self.reads.append(path)
        total = self.totals.get(path)
        return None if total is None else f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n"


def test_pods_are_not_asked_for_stalls_while_their_group_has_none() -> None:
    pages, files = FilePages(), Pressures()
    port = cast("FilePort", files)

    def look(inode: int = 7) -> list[int | None]:
        pages.look_above(port, "/pods")
        files.reads.clear()
        return [pages.memory_pressure(port, path, inode)[0] for path in ("/pods/a", "/pods/b", "/other")]

    assert (look(), files.reads) == ([2, 3, 1], ["/pods/a", "/pods/b", "/other"])
    assert (look(), files.reads) == ([2, 3, 1], ["/other"]), "who is not in the group is asked each time"
    files.totals |= {"/pods": 9, "/pods/b": 7}
    assert (look(), files.reads) == ([2, 7, 1], ["/pods/a", "/pods/b", "/other"])
    assert (look(8), files.reads) == ([2, 7, 1], ["/pods/a", "/pods/b", "/other"]), "other cgroups have the names now"
    files.totals["/pods"] = None
    assert (look(8), files.reads) == ([2, 7, 1], ["/pods/a", "/pods/b", "/other"]), "the group cannot be read"


# -- what pages really look like ----------------------------------------------------------------------------------


def page(name="lat", bounds=("0.01", "0.02", "+Inf"), counts=(90, 99, 100), labels=""):
    return "".join(f'{name}_bucket{{{labels}le="{b}"}} {c}\n' for b, c in zip(bounds, counts, strict=True))


async def read(text, **changes):
    async with serving(web.Response(text=text)) as url:
        return await scrape(url, **changes)


MILLISECONDS = ("0.5", "1", "5", "10", "100", "10000", "+Inf")


@pytest.mark.parametrize(
    ("metric", "head", "changes"),
    [
        pytest.param("lat_milliseconds", "", {}, id="the name says so"),
        pytest.param("lat_ms", "", {}, id="a short name says so"),
        pytest.param("lat", "# UNIT lat milliseconds\n", {}, id="the page says so"),
        pytest.param("lat", "", {"unit": "milliseconds"}, id="the policy says so"),
    ],
)
async def test_bounds_in_milliseconds_are_read_as_such(metric, head, changes):
    text = head + page(metric, MILLISECONDS, (1, 2, 3, 4, 5, 6, 7))
    reading, _ = await read(text, metric=metric, p99=0.03, **changes)
    assert reading.bounds_seconds[:3] == (0.0005, 0.001, 0.005)


async def test_bounds_that_look_like_milliseconds_are_refused_with_the_mend():
    reading, problem = await read(page(bounds=MILLISECONDS, counts=(1, 2, 3, 4, 5, 6, 7)), p99=0.03)
    assert reading is None
    assert "look like milliseconds" in problem
    assert "slo.unit: milliseconds" in problem


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\r", "\x0c", "\x1c", "}", "} 7", " # {", "\\"])
async def test_a_strangers_character_in_a_label_costs_nothing(character):
    path = character.replace("\\", "\\\\")
    text = page(labels=f'path="/search?q=a{path}b",') + page(labels='path="/",', counts=(1, 1, 1))
    reading, problem = await read(text)
    assert (reading.counts, problem) == ((91.0, 100.0, 101.0), "")


async def test_a_bad_line_costs_one_line():
    reading, problem = await read('lat_bucket{path="\nlat_bucket{le="0.01" 3\n' + page())
    assert (reading.counts, problem) == ((90.0, 99.0, 100.0), "")


async def test_exemplars_and_timestamps_are_not_the_value():
    text = 'lat_bucket{le="0.02"} 99 1700000000000\nlat_bucket{le="+Inf"} 100 # {trace_id="a} 1"} 0.3 1.0\n'
    reading, _ = await read(text)
    assert reading.counts == (99.0, 100.0)


async def test_series_are_added_up_on_the_bounds_that_all_have():
    fast = page(bounds=("0.01", "0.02", "+Inf"), counts=(5, 9, 10), labels='handler="read",')
    slow = page(bounds=("0.02", "0.5", "+Inf"), counts=(7, 9, 10), labels='handler="write",')
    reading, problem = await read(fast + slow)
    assert (reading.bounds_seconds, reading.counts, problem) == ((0.02,), (16.0, 20.0), "")


async def test_series_without_a_common_bound_are_named():
    fast = page(bounds=("0.01", "+Inf"), counts=(5, 10), labels='handler="read",')
    slow = page(bounds=("0.5", "+Inf"), counts=(9, 10), labels='handler="write",')
    reading, problem = await read(fast + slow)
    assert reading is None
    assert "different buckets" in problem
    assert "choose one by `labels`" in problem


async def test_another_kind_of_histogram_is_named():
    _, problem = await read('lat_bucket{vmrange="1.0e-02...1.1e-02"} 3\n')
    assert "vmrange" in problem


async def test_a_page_of_megabytes_is_read_and_the_decoys_cost_nothing():
    decoys = "".join(f'other_bucket{{path="/{i}",le="0.1"}} {i}\n' for i in range(250_000))
    assert len(decoys) > 8 << 20
    wanted = "".join(page(labels=f'path="/{i}",') for i in range(2000))
    reading, problem = await read(decoys + wanted, scrape_timeout=20.0)
    assert (reading.counts[-1], problem) == (200_000.0, "")


async def test_what_was_refused_for_its_size_is_not_fetched_again_at_once():
    asked: list[int] = []

    async def large(_request):
        asked.append(1)
        return web.Response(text="lat_bucket\n" * (MAX_WANTED_BYTES // 9))

    async with serving(large) as url:
        scraper = LatencyScraper()
        slo = ServiceLevelObjective(p99=0.02, url=url, metric="lat", scrape_timeout=10.0)
        for _ in range(3):
            await scraper.scrape({"web": slo}, 10.0)
        await scraper.close()
    assert len(asked) == 1


@pytest.mark.parametrize("start_time", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 0, 1, 2, 1, 0)])
async def test_pages_of_several_workers_are_no_evidence_and_are_said_to_be(order, start_time):
    asked: list[int] = []

    async def workers(_request):
        worker = order[len(asked) % len(order)]
        asked.append(worker)
        total = (100, 70_000, 1500)[worker] + 3 * asked.count(worker)
        text = page(counts=(total * 94 // 100, total * 94 // 100, total))
        return web.Response(text=text + (f"process_start_time_seconds 1.7e9{worker}\n" if start_time else ""))

    async with serving(workers) as url:
        reading, problem = await scrape(url, times=12)
    assert reading is None
    assert "do not belong to one process" in problem


async def test_a_service_that_restarted_once_is_evidence():
    asked: list[int] = []

    async def restarted(_request):
        asked.append(1)
        total = 1000 + len(asked) if len(asked) < 4 else 3 * len(asked)
        return web.Response(text=page(counts=(total, total, total)) + f"process_start_time_seconds {len(asked) // 4}\n")

    async with serving(restarted) as url:
        reading, problem = await scrape(url, times=7)
    assert reading is not None
    assert problem == ""
