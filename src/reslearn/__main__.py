"""python -m reslearn"""

from reslearn.cli import main

if __name__ == "__main__":
    main()
