import sys

if sys.argv[:1] == ["-m"]:  # a command of this folder is being started, and will import for seconds
    if sys.version_info < (3, 11):
        sys.exit("the workshop needs Python 3.11 or newer; on 3.10 there is the runtime alone (gemvg_edge)")
    from gemvg_edge.interrupts import quiet_interrupts

    quiet_interrupts()
