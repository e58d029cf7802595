import sys

if sys.argv[:1] == ["-m"]:  # a command of this folder is being started, and will import for seconds
    from gemvg_edge.interrupts import quiet_interrupts

    quiet_interrupts()
