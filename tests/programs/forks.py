"""A process that has loaded everything once and then forks the command line for each JSON line on its input.

Each fork is a session of its own, so that a test can kill it, its workers or all of them, without waiting for torch to load.
Workers are forked too, not spawned; tests/test_cli.py kills runs with spawned ones.
"""

import json
import multiprocessing
import os
import signal
import sys

if __name__ == "__main__":
    import ssmax.model_folders
    import ssmax.paper.reproduce  # noqa: F401
    from ssmax import cli

    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, path in ((0, os.devnull), (1, wanted["out"]), (2, wanted["err"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
            status = 1
            try:
                cli.main(wanted["arguments"])
            except SystemExit as end:
                status = end.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
