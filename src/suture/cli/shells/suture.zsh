#compdef suture
# Completion of `suture` for zsh, made by `suture completion zsh`.
_suture_words() {
    case $1 in
@WORDS@
    esac
}

_suture() {
    local verb method surgery before key
    local -a candidates ready open
    for before in ${words[2,CURRENT-1]}; do
        case $before in
            method=*) method=${before#method=} ;;
            surgery=*) surgery=${before#surgery=} ;;
            -*|*=*) ;;
            *) : ${verb:=$before} ;;
        esac
    done
    if [[ $PREFIX == *=* ]]; then
        key=${PREFIX%%=*}=
        compset -P '*='
        candidates=(${=$(_suture_words $key)})
        compadd -a candidates
        case $key in
            modelpool=|taskpool=|base=|models.*|model=|mergekit=|output=) _files ;;
        esac
        return
    fi
    (( CURRENT > 2 )) && : ${verb:=run}
    candidates=(${=$(_suture_words $verb)} --json --quiet --traceback)
    case $verb in
        run|check|evaluate|analyse|merge)
            candidates+=(${=$(_suture_words method:$method)} ${=$(_suture_words surgery:$surgery)}) ;;
    esac
    open=(${(M)candidates:#*[=.]})
    ready=(${candidates:#*[=.]})
    compadd -a ready
    compadd -S '' -a open
    [[ $verb == (report|merge) ]] && _files
    return 0
}

if [[ ${funcstack[1]} == _suture ]]; then _suture "$@"; else compdef _suture suture; fi
