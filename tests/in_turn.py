"""Commands from stdin (JSON: lists of module and arguments), one after the other in this process; results to stdout.

Each result is [command, exit code, stdout, stderr]. It saves the imports of all processes but one, for cases of which
another test types one as a user does.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback

from hydra.core.global_hydra import GlobalHydra


def run(module, *arguments):
    sys.argv = [module, *arguments]
    GlobalHydra.instance().clear()
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except Exception:
            traceback.print_exc()
            code = 1
    return [module, *arguments], code, out.getvalue(), error.getvalue()


if __name__ == "__main__":
    results = [run(*command) for command in json.load(sys.stdin)]
    json.dump(results, sys.stdout)
