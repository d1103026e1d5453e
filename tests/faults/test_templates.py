"""Hostile chat templates: none gets out of its process, none holds it longer than a moment, the next one renders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.errors import TemplateError
from luthier.data.rendering import process as render_process
from luthier.data.rendering.process import RenderProcess
from luthier.data.rendering.template import Template, Wanted
from tests.faults.payloads import BOMBS, LIMITED, SWIFT, TEMPLATES

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SECRETS = ("root:", "<class '", "<built-in", "__builtins__", "subclasses", "co_consts", "LUTHIER_SECRET")
TRIED = [pytest.param(name, marks=[] if name in SWIFT else [pytest.mark.slow]) for name in BOMBS]


@pytest.fixture
def process() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


def sources(tmp_path: Path) -> tuple[Path, list[str]]:
    """The canary file, and the payloads that aim at it."""
    canary = tmp_path / "canary"
    return canary, [text.replace("COMMAND", f"touch {canary}").replace("PATH", str(canary)) for text in TEMPLATES]


def test_no_template_gets_out(tmp_path, process, monkeypatch):
    """Breaks when a known way out of the sandbox shows an object of Python or runs code."""
    monkeypatch.setenv("LUTHIER_SECRET", "LUTHIER_SECRET")
    canary, hostile = sources(tmp_path)
    assert len(hostile) == len(set(hostile)) >= 100
    refused = 0
    for source in hostile:
        try:
            text = Template(source, {}, name="hostile", process=process).render(MESSAGES)
        except TemplateError as error:
            refused += 1
            assert error.code == "template" and "the process" not in str(error), source
        else:
            assert not any(secret in text for secret in SECRETS), f"{source}\n{text}"
    assert not canary.exists() and refused >= 70
    assert Template("well", {}, name="good", process=process).render(MESSAGES) == "well"


CONTROL = """
import sys
from jinja2 import Environment
sys.path.insert(0, sys.argv[2])
from tests.faults.payloads import TEMPLATES
canary = sys.argv[1]
ran = 0
for source in TEMPLATES:
    environment = Environment()
    environment.globals.update(raise_exception=lambda text: text, messages=[{"role": "user"}])
    environment.globals["raise_exception"].__globals__.setdefault("os", __import__("os"))
    try:
        environment.from_string(source.replace("COMMAND", "touch " + canary).replace("PATH", canary)).render()
    except Exception:
        pass
    import os
    if os.path.exists(canary):
        ran += 1
        os.unlink(canary)
print(ran)
"""


def test_the_same_templates_get_out_of_plain_jinja(tmp_path):
    """The negative control: without the sandbox, in a process of its own, the payloads do write the canary."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CONTROL, str(tmp_path / "canary"), str(root)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert int(done.stdout) >= 10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SWIFT else pytest.mark.slow) for name in BOMBS]
)
def test_no_template_uses_up_the_machine(name, shared):
    """Breaks when a template runs longer than a moment, fills the memory, or spoils the process for the next one."""
    good = Template("{{ messages[0].content }}", {}, name="good", process=shared)
    used, began = _processor_time(shared.pid), time.monotonic()
    words = ""
    try:
        text = Template(BOMBS[name], {}, name="bomb", process=shared).render(MESSAGES)
    except TemplateError as error:
        words = str(error)
    else:
        assert len(text) <= 4 * 1024 * 1024
    # Other work on the machine adds to the wall time, so the better of the two clocks counts.
    assert min(_processor_time(shared.pid) - used, time.monotonic() - began) < 2
    assert "template_limit" in words or name not in LIMITED
    assert good.render(MESSAGES) == "hi"


@pytest.fixture(scope="module")
def shared() -> Iterator[RenderProcess]:
    made = RenderProcess()
    yield made
    made.close()


def _processor_time(child: int | None) -> float:
    """What we, our ended children and this one have used so far."""
    now = os.times()
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split() if _alive(child) else ["0"] * 13
    running = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return now.user + now.system + now.children_user + now.children_system + running


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_somebody_ends_is_replaced(ended, process):
    """Breaks when the next rendering fails, or a dead process stays as a zombie."""
    template = Template("{{ messages[0].content }}", {}, name="good", process=process)
    seen = set()
    for _ in range(3):
        assert template.render(MESSAGES) == "hi"
        seen.add(process.pid)
        os.kill(process.pid, ended)
        assert template.render_many([Wanted(MESSAGES)] * 3) == ["hi"] * 3
    assert len(seen) == 3
    last = process.pid
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    with pytest.raises(ChildProcessError):
        os.waitpid(last, os.WNOHANG)
    assert template.render(MESSAGES) == "hi"


def test_a_bomb_in_a_batch_hides_no_other(process):
    """Breaks when one bad rendering takes the good ones of its batch with it, or their order changes."""
    source = "{% if messages[0].bomb %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" \
        "{% endif %}{{ messages[0].n }}"  # fmt: skip
    template = Template(source, {}, name="bomb", process=process)
    made = template.render_many([Wanted([{"n": n, "bomb": n in (2, 3)}]) for n in range(6)])
    assert [text for text in made if isinstance(text, str)] == ["0", "1", "4", "5"]
    assert [n for n, text in enumerate(made) if isinstance(text, TemplateError)] == [2, 3]
    assert "processor time" in str(made[2]) and "template_limit" in str(made[2])


def test_a_process_that_hangs_is_given_up(process, monkeypatch):
    """Breaks when a process that neither answers nor ends holds the run for ever."""
    template = Template("{{ messages[0].content }}", {}, name="good", process=process)
    stopped = process.pid
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(render_process, "WALL_SECONDS", 0.3)
    with pytest.raises(TemplateError, match=r"did not answer within 0.3 seconds.*template_limit"):
        template.render(MESSAGES)
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    assert template.render(MESSAGES) == "hi"


def test_an_interrupted_rendering_does_not_shift_the_next(process, monkeypatch):
    """Breaks when an answer that nobody waited for is taken for that of the next request."""
    template = Template("{{ messages[0].content }}", {}, name="good", process=process)

    def interrupted(worker: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(render_process._Worker, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"content": "lost"}])
    assert template.render(MESSAGES) == "hi"


def test_threads_share_a_process(process):
    """Breaks when texts of two threads are exchanged, or the process ends with the thread that started it."""
    template: list[Template] = []
    source = "{{ messages[0].content }}"
    thread = threading.Thread(target=lambda: template.append(Template(source, {}, name="good", process=process)))
    thread.start()
    thread.join()
    started = process.pid
    wrong: list[str] = []

    def work(name: str) -> None:
        for number in range(40):
            want = f"{name} {number}"
            wrong.extend([want] if template[0].render([{"content": want}]) != want else [])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong and process.pid == started


PARENT = """
import sys, time
from luthier.data.rendering.template import Template
template = Template("{{ messages | length }}", {}, name="x")
print(template._process.pid, flush=True)
time.sleep(60)
"""


def test_the_process_ends_with_its_parent():
    """Breaks when a killed run leaves a process behind."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not _alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the process lives on")


def _alive(pid: int | None) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
from luthier.data.rendering.template import Template
text = Template("{{ messages | length }}", {}, name="x").render([{}])
os.open("/dev/null", os.O_RDWR)
with open(sys.argv[1], "w") as file:
    file.write(text)
"""

FORKED = """
import os, sys
from luthier.data.rendering.template import Template
template = Template("{{ messages[0] }}", {}, name="x")
child = os.fork()
for number in range(50):
    assert template.render([f"{child} {number}"]) == f"{child} {number}"
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert template.render([1]) == "1"
with open(sys.argv[1], "w") as file:
    file.write("1")
"""


@pytest.mark.parametrize("program", [CLOSED, FORKED], ids=["standard streams closed", "forked"])
def test_it_works_where_parents_are_odd(program, tmp_path):
    """Breaks when closed standard streams or a fork mix up the pipes of parent and process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "out")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").read_text() == "1"


INSIDE = """
import json, os, socket
from luthier.data.rendering import worker as render_worker

def probe(template, context):
    found = []
    for path in ("/etc/passwd", "/dev/null", __file__):
        try:
            os.open(path, os.O_RDONLY)
            found.append(path)
        except OSError:
            pass
    for name, act in (("socket", socket.socket), ("pipe", os.pipe), ("memory", lambda: bytearray(512 << 20))):
        try:
            act()
            found.append(name)
        except (OSError, MemoryError):
            pass
    return render_worker.Answer.TEXT, json.dumps({"reached": found, "environment": dict(os.environ)})

render_worker._render = probe
render_worker.main()
"""


def test_even_code_inside_finds_nothing(tmp_path, monkeypatch):
    """Breaks when code that got out of the sandbox could read a file, open a socket, see a token or fill the memory."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "probe_inside.py").write_text(INSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(render_process, "WORKER", "probe_inside")
    inside = RenderProcess()
    seen = json.loads(Template("x", {}, name="x", process=inside).render([]))
    inside.close()
    assert seen["reached"] == []
    assert not any("secret" in value for value in seen["environment"].values())
