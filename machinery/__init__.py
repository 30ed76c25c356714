"""What stands behind the scripts, room by room; the README has the map."""
import sys

if sys.version_info < (3, 11):                      # before tomllib is imported, which is as new
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; expected 3.11 or newer")
