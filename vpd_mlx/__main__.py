"""`vpd-mlx`, and `python -m vpd_mlx`: what must stand before the command line's libraries are loaded."""

import sys


def main() -> None:
    """Entry point: a command, with standard streams that cannot harm it; Ctrl-C is one line from the first moment on."""
    try:
        _command()
    except KeyboardInterrupt:
        sys.stderr.write("\nvpd-mlx: stopped by SIGINT\n")
        _end_soon()
        raise SystemExit(130) from None
    finally:
        # CPython remembers an interrupt that passed through `exec`, as it may while a module loads, and `python -m` would end by
        # SIGINT whatever its status. Another `exec` makes it forget.
        exec("")


def _end_soon() -> None:
    """See that a hanging thread, such as a verifier's, does not keep the process from ending."""
    import os
    import threading

    end = threading.Timer(2.0, os._exit, (130,))
    end.daemon = True
    end.start()


def _command() -> None:
    from vpd_mlx.common.streams import lasting, prepare

    prepare()
    with lasting() as output:
        try:
            from vpd_mlx.commands.app import main as command

            command()
        except ImportError as error:
            if "libmlx" not in str(error):
                raise
            remedy = "pip install 'vpd-mlx[cpu]', or 'vpd-mlx[cuda]' for an NVIDIA card"
            sys.stderr.write(f"vpd-mlx: mlx has no backend here ({error}); {remedy}\n")
            raise SystemExit(2) from None
        finally:
            output.flush()
            if output.lost is not None:
                sys.stderr.write(f"vpd-mlx: standard output cannot be written ({output.lost}); give it another place\n")
                raise SystemExit(3)


if __name__ == "__main__":
    main()
