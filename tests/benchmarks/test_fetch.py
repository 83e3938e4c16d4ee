"""Files are fetched once, checked by their hash, and a changed one is not kept."""

import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from rlaifv.benchmarks import fetch


@pytest.fixture
def remote(tmp_path):
    """A folder behind a server on loopback; gives the folder, its address and the list of what was asked for."""
    folder, asked = tmp_path / "remote", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append(self.path)

        def log_error(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_file_is_fetched_checked_and_not_fetched_again(remote, tmp_path):
    folder, address, asked = remote
    (folder / "a.json").write_bytes(b"[1]")
    benchmarks = {"x": fetch.Benchmark((fetch.File(f"{address}/a.json", sha256(b"[1]")),))}
    for _ in range(2):
        target = fetch.fetch("x", tmp_path / "data", benchmarks)
    assert (target / "a.json").read_bytes() == b"[1]"
    assert asked == ["/a.json"]


def test_a_file_may_lie_deeper_than_its_name(remote, tmp_path):
    folder, address, _ = remote
    (folder / "a.json").write_bytes(b"[1]")
    file = fetch.File(f"{address}/a.json", sha256(b"[1]"), "of/others/b.json")
    assert (fetch.fetch("x", tmp_path, {"x": fetch.Benchmark((file,))}) / "of/others/b.json").read_bytes() == b"[1]"


def test_a_changed_file_is_refused_and_not_kept(remote, tmp_path):
    folder, address, _ = remote
    (folder / "a.json").write_bytes(b"[2]")
    benchmarks = {"x": fetch.Benchmark((fetch.File(f"{address}/a.json", sha256(b"[1]")),))}
    with pytest.raises(ValueError, match="the file changed"):
        fetch.fetch("x", tmp_path / "data", benchmarks)
    assert list((tmp_path / "data/x").iterdir()) == []


def test_a_file_that_is_not_there_is_named(remote, tmp_path):
    _, address, _ = remote
    benchmarks = {"x": fetch.Benchmark((fetch.File(f"{address}/absent.json"),))}
    with pytest.raises(ConnectionError, match=r"absent.json: HTTP Error 404"):
        fetch.fetch("x", tmp_path / "data", benchmarks)


def test_an_archive_is_unpacked(remote, tmp_path):
    folder, address, _ = remote
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("annotations/a.json", "[]")
    digest = f"md5:{hashlib.md5((folder / 'all.zip').read_bytes()).hexdigest()}"
    target = fetch.fetch("x", tmp_path, {"x": fetch.Benchmark((fetch.File(f"{address}/all.zip", digest),))})
    assert (target / "annotations/a.json").read_text() == "[]"


def test_an_unknown_benchmark_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="amber, coco, mmhal, refomb, pope, object_halbench"):
        fetch.fetch("hallusion", tmp_path)


def test_the_pinned_hashes_are_those_of_the_files_that_were_tested(shared):
    pinned = {file.name: file.digest for b in fetch.BENCHMARKS.values() for file in b.files if file.digest}
    golden = {path.relative_to(shared / "golden").as_posix(): path for path in (shared / "golden").rglob("*.json*")}
    popes = {path.name: path for path in (shared / "golden/pope_llava15").glob("coco*.json")}
    for name, path in {**golden, **popes, **{p.name: p for p in (shared / "benchmarks").rglob("*.*")}}.items():
        if name in pinned:
            assert sha256(path.read_bytes()) == pinned.pop(name)
    assert set(pinned) == {"annotations_trainval2014.zip"}
