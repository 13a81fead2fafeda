"""`python -m convert_w4a8` is `w4a8`.

Python puts the working directory first where it looks for modules then, and that may be a checkpoint's: a file called
`numba.py` there would be run. So it goes, before anything else is imported. What Python itself and `__init__.py` import
before this, only `python -P -m convert_w4a8` protects.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]
    from convert_w4a8.cli.main import main

    main()
