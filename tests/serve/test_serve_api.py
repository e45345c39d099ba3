"""The HTTP API: what it answers, what it refuses, in which words and with which status."""

from __future__ import annotations

import concurrent.futures
import socket
import struct
import tempfile
import zlib
from typing import Any

import pytest
from httpx import Client, Response
from stand_in import STEPS, FakeTrained, png, serving, text

from innerloop.serve import Limits
from innerloop.serve.kept import Kept
from innerloop.serve.limits import RefusedError

BLACK, GREY, WHITE = png(0), png(128), png(255)


def adapt(client: Client, **classes: bytes) -> Any:
    answer = client.post("/api/adapt", json={"classes": {name: [text(image)] for name, image in classes.items()}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: Response, status: int) -> str:
    """The sentence of an error, once it is sure that it is one sentence in JSON and nothing else."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert "Traceback" not in answer.text
    assert body["error"].endswith(".")
    return str(body["error"])


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_adapt_and_predict_in_json(client: Client) -> None:
    adapted = adapt(client, night=BLACK, day=WHITE)
    assert adapted["classes"] == ["night", "day"]
    assert adapted["steps"] == STEPS
    assert adapted["support_losses"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert adapted["support_accuracies"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert adapted["notes"] == ["a note"]
    answer = client.post(f"/api/predict/{adapted['id']}", json={"images": [text(png(20)), text(png(230))]}).json()
    assert answer["classes"] == ["night", "day"]
    assert [p["answer"] for p in answer["predictions"]] == ["night", "day"]
    for prediction in answer["predictions"]:
        assert len(prediction["by_step"]) == STEPS + 1
        assert prediction["by_step"][0] == [0.5, 0.5]
        assert list(prediction["probabilities"].values()) == prediction["by_step"][-1]
        assert all(sum(step) == pytest.approx(1) for step in prediction["by_step"])


def test_adapt_and_predict_with_files(client: Client) -> None:
    files = [("nuit étoilée", ("a.png", BLACK)), ("day", ("b.jpg", png(255, kind="JPEG"))), ("day", ("c.gif", WHITE))]
    adapted = client.post("/api/adapt?steps=2", files=files).json()
    assert adapted["classes"] == ["nuit étoilée", "day"]
    assert adapted["steps"] == 2
    answer = client.post(f"/api/predict/{adapted['id']}", files={"image": ("q.png", BLACK)}).json()
    assert answer["predictions"][0]["answer"] == "nuit étoilée"


def test_names_in_any_script(client: Client) -> None:
    names = ["👩\u200d🚀", "हिन्दी", "__proto__"]  # the first is of three code points, one of them invisible
    adapted = adapt(client, **dict.fromkeys(names, BLACK))
    assert adapted["classes"] == names


def test_a_data_url_is_base64_too(client: Client) -> None:
    adapted = adapt(client, night=BLACK, day=WHITE)
    url = "data:image/png;base64," + text(WHITE)
    answer = client.post(f"/api/predict/{adapted['id']}", json={"images": [url]}).json()
    assert answer["predictions"][0]["answer"] == "day"


def test_classifiers_do_not_mix(client: Client) -> None:
    first, second = adapt(client, night=BLACK, day=WHITE), adapt(client, day=BLACK, night=WHITE)
    assert first["id"] != second["id"]
    assert len(first["id"]) >= 22
    for adapted, said in ((first, "night"), (second, "day"), (first, "night")):
        answer = client.post(f"/api/predict/{adapted['id']}", json={"images": [text(BLACK)]}).json()
        assert answer["predictions"][0]["answer"] == said


def test_forget(client: Client) -> None:
    adapted = adapt(client, night=BLACK, day=WHITE)
    kept = client.get("/api/health").json()["classifiers"]
    assert client.delete(f"/api/classifiers/{adapted['id']}").status_code == 204
    assert client.get("/api/health").json()["classifiers"] == kept - 1
    question = client.post(f"/api/predict/{adapted['id']}", json={"images": [text(BLACK)]})
    assert "forgotten" in refusal(question, 404)
    refusal(client.delete(f"/api/classifiers/{adapted['id']}"), 404)


def test_the_longest_unused_is_forgotten_first(client: Client) -> None:
    first, second = adapt(client, a=BLACK, b=WHITE), adapt(client, a=BLACK, b=WHITE)

    def ask(adapted: Any) -> int:
        return client.post(f"/api/predict/{adapted['id']}", json={"images": [text(BLACK)]}).status_code

    assert ask(first) == 200
    third = adapt(client, a=BLACK, b=WHITE)  # two are kept
    assert [ask(first), ask(second), ask(third)] == [200, 404, 200]


def test_the_unused_expire() -> None:
    now = 0.0
    kept: Kept[str] = Kept(Limits(idle_seconds=10), clock=lambda: now)
    one, two = kept.keep("one", 1), kept.keep("two", 1)
    now = 8
    assert kept.get(two) == "two"
    now = 12
    assert len(kept) == 1
    with pytest.raises(RefusedError):
        kept.get(one)
    assert kept.get(two) == "two"


def test_what_is_kept_is_bounded_in_bytes() -> None:
    kept: Kept[str] = Kept(Limits(kept_bytes=10))
    one, two, large = kept.keep("one", 5), kept.keep("two", 5), kept.keep("large", 6)
    assert len(kept) == 1
    for name in (one, two):
        with pytest.raises(RefusedError):
            kept.get(name)
    assert kept.get(large) == "large"
    assert kept.get(kept.keep("too large", 99)) == "too large"
    assert len(kept) == 1


def test_a_learned_head_bounds_the_classes() -> None:
    many = {"classes": {n: [text(BLACK)] for n in "abcdef"}}
    with serving(FakeTrained(any_ways=False), Limits()) as client:
        assert client.get("/api/info").json()["model"]["most_classes"] == 5
        assert "6 classes are more than the limit of 5" in refusal(client.post("/api/adapt", json=many), 413)


def test_info_says_what_is_served(client: Client) -> None:
    info = client.get("/api/info").json()
    assert info["model"] == {
        "preset": "quickstart",
        "dataset": "strokes",
        "ways": 5,
        "shots": 1,
        "most_classes": 3,
        "inner_steps": STEPS,
        "image_size": 8,
        "channels": 1,
    }
    assert info["limits"]["images"] == 6
    assert client.get("/api/health").json()["status"] == "ok"


def test_openapi_describes_every_way_in(client: Client) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/api/health",
        "/api/info",
        "/api/adapt",
        "/api/predict/{id}",
        "/api/classifiers/{id}",
    }
    body = described["paths"]["/api/adapt"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    failure = described["paths"]["/api/adapt"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
    assert failure["$ref"].endswith("/Failure")
    for path in ("/docs", "/redoc"):  # they load scripts from elsewhere
        refusal(client.get(path), 404)


@pytest.mark.parametrize(
    ("classes", "status", "words"),
    [
        ({"a": [text(BLACK)]}, 422, "At least two classes"),
        ({}, 422, "there are none"),
        ({"a": [text(BLACK)], "b": []}, 422, "'b' has no examples"),
        ({"a": [text(BLACK)], " ": [text(BLACK)]}, 422, "no name"),
        ({"a": [text(BLACK)], "b" * 81: [text(BLACK)]}, 422, "longer than 80"),
        ({"a": [text(BLACK)], "b\n": [text(BLACK)], "c\x00": []}, 422, "cannot be shown"),
        ({n: [text(BLACK)] for n in "abcd"}, 413, "4 classes are more than the limit of 3"),
        ({"a": [text(BLACK)] * 4, "b": [text(BLACK)] * 4}, 413, "limit of 6 images"),
        ({"a": [text(BLACK)], "b": ["not base64!"]}, 400, "Image 1 of 'b' is not valid base64"),
        ({"a": [text(BLACK)], "b": [text(b"some words")]}, 415, "Image 1 of 'b' is not an image"),
        ({"a": [text(BLACK)], "b": [text(BLACK[:-30])]}, 422, "Image 1 of 'b' is damaged"),
        ({"a": [text(BLACK)], "b": [text(bomb(10_000, 10_000))]}, 413, "Image 1 of 'b' has too many pixels"),
        ({"a": [text(BLACK)], "b": [text(bomb(60_000, 60_000))]}, 413, "too many pixels"),
        ({"a": [text(png(0, (90, 90)))], "b": [text(png(0, (90, 90)))]}, 413, "more than 15,000 pixels together"),
        ({"a": [text(BLACK)], "b": text(BLACK)}, 422, "classes.b"),
        ({"a": [text(BLACK)], "b": ["A" * 200_000]}, 413, "larger than the limit"),
    ],
)
def test_refused_support_sets(client: Client, classes: Any, status: int, words: str) -> None:
    assert words in refusal(client.post("/api/adapt", json={"classes": classes}), status)


def test_a_postscript_file_is_not_run(client: Client) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    body = {"classes": {"a": [text(BLACK)], "b": [text(postscript)]}}
    refusal(client.post("/api/adapt", json=body), 415)


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("application/json", b'{"classes": ', 400, "not valid JSON"),
        ("application/json", b"[]", 422, "the request"),
        ("application/json", b'{"images": []}', 422, "classes"),
        ("text/plain", b"hello", 415, "text/plain"),
        ("", b"hello", 415, "nothing"),
        ("multipart/form-data", b"hello", 400, "not valid multipart"),
        ("multipart/form-data; boundary=x", b"hello", 400, "not valid multipart"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
            400,
            "multipart",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\ncut off',
            400,
            "not valid multipart",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="cat"\r\n\r\na.png\r\n--x--\r\n',
            422,
            "'cat=@FILE'",
        ),
    ],
)
def test_refused_bodies(client: Client, kind: str, body: bytes, status: int, words: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert words in refusal(client.post("/api/adapt", content=body, headers=headers), status)


def test_a_text_file_called_png(client: Client) -> None:
    files = [("a", ("a.png", BLACK)), ("b", ("notes.png", b"just some notes"))]
    assert "'notes.png' is not an image" in refusal(client.post("/api/adapt", files=files), 415)


def test_a_body_that_does_not_say_how_long_it_is(client: Client) -> None:
    answer = client.post(
        "/api/adapt", content=(b"x" * 1000 for _ in range(200)), headers={"Content-Type": "application/json"}
    )
    assert "larger than the limit" in refusal(answer, 413)


@pytest.mark.parametrize("steps", ["0", "10", "-1", "many"])
def test_refused_steps(client: Client, steps: str) -> None:
    body = {"classes": {"a": [text(BLACK)], "b": [text(WHITE)]}}
    assert "steps" in refusal(client.post(f"/api/adapt?steps={steps}", json=body), 422)


def test_refused_queries(client: Client) -> None:
    path = f"/api/predict/{adapt(client, a=BLACK, b=WHITE)['id']}"
    assert "no image" in refusal(client.post(path, json={"images": []}), 422)
    assert "limit of 6" in refusal(client.post(path, json={"images": [text(BLACK)] * 7}), 413)
    assert "Image 2 is not an image" in refusal(client.post(path, json={"images": [text(BLACK), text(b"?")]}), 415)
    assert "forgotten" in refusal(client.post("/api/predict/unknown", json={"images": [text(BLACK)]}), 404)


def test_the_librarys_words_are_passed_on(trained: FakeTrained) -> None:
    trained.fails = ValueError("seven ways are too many for this model.")
    body = {"classes": {"a": [text(BLACK)], "b": [text(WHITE)]}}
    with serving(trained, Limits()) as client:
        assert refusal(client.post("/api/adapt", json=body), 422) == "seven ways are too many for this model."


def test_a_mistake_of_the_servers_stays_in_its_terminal(trained: FakeTrained, caplog: pytest.LogCaptureFixture) -> None:
    trained.fails = RuntimeError("a secret at line 12")
    body = {"classes": {"a": [text(BLACK)], "b": [text(WHITE)]}}
    with serving(trained, Limits()) as client:
        answer = client.post("/api/adapt", json=body)
    assert "secret" not in refusal(answer, 500)
    assert "secret" in caplog.text
    assert "Content-Security-Policy" in answer.headers


def test_unknown_paths_and_methods(client: Client) -> None:
    assert "/api/nothing" in refusal(client.get("/api/nothing"), 404)
    assert "GET" in refusal(client.get("/api/adapt"), 405)
    refusal(client.get("/static/../app.py"), 404)
    refusal(client.get("/static/%2e%2e/app.py"), 404)


def test_the_page_is_served_with_security_headers(client: Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/info").headers["cache-control"] == "no-store"
    for word in ("http://", "https://", "style=", "onclick"):
        assert word not in page.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "localhost:8000", "LOCALHOST", "[::1]:8000"])
def test_loopback_names(client: Client, host: str) -> None:
    assert client.get("/api/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", "", "a@evil"])
def test_other_names_are_refused(client: Client, host: str) -> None:
    answer = client.get("/api/health", headers={"Host": host})
    assert "host name" in refusal(answer, 403)
    assert "Content-Security-Policy" in answer.headers


def test_other_origins_are_refused(client: Client) -> None:
    own = str(client.base_url).rstrip("/")
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{own}.evil.example", "http://["):
        assert "elsewhere" in refusal(client.post("/api/adapt", headers={"Origin": origin}), 403)
    same = client.get("/api/health", headers={"Origin": own})
    assert same.status_code == 200


def test_one_adaptation_at_a_time_and_a_short_queue(trained: FakeTrained) -> None:
    body = {"classes": {"a": [text(BLACK)], "b": [text(WHITE)]}}
    with serving(trained, Limits(waiting=2)) as client, concurrent.futures.ThreadPoolExecutor(6) as pool:
        trained.hold.clear()
        asked = [pool.submit(client.post, "/api/adapt", json=body) for _ in range(6)]
        # One computes and two wait, so three of the six are turned away while nothing moves.
        for _, turned_away in zip(range(3), concurrent.futures.as_completed(asked, timeout=30), strict=False):
            answer = turned_away.result()
            assert "busy" in refusal(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0
        trained.hold.set()
        assert sorted(f.result().status_code for f in asked) == [200, 200, 200, 503, 503, 503]
    assert trained.most_at_once == 1


def test_waiting_ends(trained: FakeTrained) -> None:
    body = {"classes": {"a": [text(BLACK)], "b": [text(WHITE)]}}
    with serving(trained, Limits(wait_seconds=0.05)) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        trained.hold.clear()
        first = pool.submit(client.post, "/api/adapt", json=body)
        assert trained.entered.wait(30)
        refusal(client.post("/api/adapt", json=body), 503)
        trained.hold.set()
        assert first.result().status_code == 200


def test_a_body_that_does_not_arrive(trained: FakeTrained) -> None:
    with serving(trained, Limits(upload_seconds=0.1)) as client:
        address = (client.base_url.host, client.base_url.port or 80)
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(
                b"POST /api/adapt HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_nothing_is_written_to_disk(trained: FakeTrained, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp", "SpooledTemporaryFile"):
        monkeypatch.setattr(tempfile, name, lambda *_, **__: made.append(1))
    files = [("a", ("a.png", BLACK + bytes(5 * 2**20))), ("b", ("b.png", WHITE))]
    with serving(trained, Limits()) as client:
        assert client.post("/api/adapt", files=files).status_code == 200
    assert made == []
