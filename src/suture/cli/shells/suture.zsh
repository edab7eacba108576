#compdef suture
# Completion of `suture` for zsh, made by `suture completion zsh`.
_suture_names() {
    case $1 in
@NAMES@
    esac
}

_suture() {
    local verb method repair before typed
    local -a candidates ready open
    for before in ${words[2,CURRENT-1]}; do
        case $before in
            method=*) method=${before#method=} ;;
            repair=*|surgery=*) repair=${before/=/:} ;;
            -*|*=*) ;;
            *) : ${verb:=$before} ;;
        esac
    done
    if [[ $PREFIX == *=* ]]; then
        typed=${PREFIX%%=*}=
        compset -P '*='
        candidates=(${=$(_suture_names $typed)})
        compadd -a candidates
        case $typed in
            @PATHS@) _files ;;
        esac
        return
    fi
    (( CURRENT > 2 )) && : ${verb:=run}
    candidates=(${=$(_suture_names $verb)})
    case $verb in
        @CONFIGURED@)
            candidates+=(${=$(_suture_names method:$method)} ${=$(_suture_names $repair)}) ;;
    esac
    open=(${(M)candidates:#*[=.]})
    ready=(${candidates:#*[=.]})
    compadd -a ready
    compadd -S '' -a open
    case $verb in
        @FILES@) _files ;;
    esac
    return 0
}

if [[ ${funcstack[1]} == _suture ]]; then _suture "$@"; else compdef _suture suture; fi
