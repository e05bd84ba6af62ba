# Source this, then `phase NAME COMMAND...` runs the command, says how many seconds it took,
# and returns what it returned. The command may be a shell function of the caller.

hundredths() {
    if [ -r /proc/uptime ]; then
        read -r now _ </proc/uptime # monotonic, which `date` is not
        echo "${now%.*}${now#*.}"
    else
        echo "$(date +%s)00"
    fi
}

phase() {
    phase_name=$1
    shift
    phase_begun=$(hundredths)
    phase_code=0
    "$@" || phase_code=$?
    phase_took=$(($(hundredths) - phase_begun))
    phase_outcome=
    [ "$phase_code" -eq 0 ] || phase_outcome="  failed ($phase_code)"
    printf '==> %-20s %5d.%02d s%s\n' "$phase_name" $((phase_took / 100)) $((phase_took % 100)) "$phase_outcome"
    return "$phase_code"
}
