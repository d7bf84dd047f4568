"""Runs Python programs in processes that have torch imported already: what a new interpreter takes seconds for.

`processes.run` starts it and talks to it. A request is a line of JSON and three files, the program's standard streams;
the answer is the exit status. Each program runs in a fork that goes on from the end of the loop below, and ends as every
interpreter does. Neither attnzoo nor timm is imported here: a program finds them where its own path says, and in its own
order.
"""

import atexit
import gc
import json
import os
import runpy
import socket
import sys

import huggingface_hub  # noqa: F401
import pydantic  # noqa: F401
import sklearn.datasets  # noqa: F401
import torchvision.models  # noqa: F401 - and with it torch

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
atexit.register(gc.freeze)
first, *rest = request["arguments"]
own = os.path.dirname(__file__)
paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path[:] = paths + [path for path in sys.path if os.path.abspath(path) != own]
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
