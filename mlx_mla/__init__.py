"""Multi-head Latent Attention at GPT-2 scale, for Apple MLX."""

import os
import signal
import sys

# Without PyTorch transformers warns, when it is imported, that models are not available; none of
# its models is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# `python -m` and the script `mlx-mla` import this package first, then a command's modules. There is
# nothing to save yet, so Ctrl-C ends the process at once and without a traceback; `mlx_mla.cli.run`
# takes this back.
_program = os.path.basename(sys.argv[0]) if sys.argv else ""
if _program in ("-m", "mlx-mla") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.2.0"
