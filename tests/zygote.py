"""Runs Python programs in processes that have torch and timm at hand: what a new interpreter takes seconds for.

`processes.run` starts it and talks to it. A request is a line of JSON and three files, the program's standard streams;
the answer is the exit status. Each program runs in a fork that goes on from the end of the loop below. It ends as in every
interpreter, but for its memory, which nobody tidies up: that takes seconds. attnzoo is not imported here: a program finds it where its own path says. Nor does timm seem to be: its
modules are kept aside, and a program's `import timm` is answered with them, so that it comes in the program's own order.
"""

import atexit
import gc
import json
import os
import runpy
import socket
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_file_location

import huggingface_hub  # noqa: F401
import pydantic  # noqa: F401
import sklearn.datasets  # noqa: F401
import timm  # and with it torchvision
import torch

KEPT = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "timm"}


class Kept(MetaPathFinder, Loader):
    """Finds timm, which has been loaded already."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        return spec_from_file_location(
            name, timm.__file__, loader=self, submodule_search_locations=[*timm.__path__]
        )

    def create_module(self, spec):
        sys.modules.update(KEPT)
        return timm

    def exec_module(self, module):
        """It has been executed."""


sys.meta_path.insert(0, Kept())
atexit.unregister(torch._dynamo.utils.dump_compile_times)  # it takes 0.2 s to say nothing
gc.freeze()  # a fork that ends need not look through all this for cycles
with socket.socket(fileno=int(sys.argv[1])) as requests:
    while True:
        text, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not text:
            sys.exit()
        child = os.fork()
        if child == 0:
            break
        for file in files:
            os.close(file)
        requests.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())

for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
request = json.loads(text)
os.environ.clear()
os.environ.update(request["env"])
os.chdir(request["cwd"])
first, *rest = request["arguments"]
own = os.path.dirname(__file__)
paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path[:] = paths + [path for path in sys.path if os.path.abspath(path) != own]
status = 0
try:
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if end.code is not None and not isinstance(end.code, int):
        print(end.code, file=sys.stderr)  # noqa: T201
except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
for stream in (sys.stdout, sys.stderr):
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except Exception as error:
        os.write(2, f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}\n".encode())
        status = 120
os._exit(status & 255)
