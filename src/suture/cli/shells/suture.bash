# Completion of `suture` for bash, made by `suture completion bash`.
_suture_names() {
    case $1 in
@NAMES@
    esac
}

_suture() {
    local line=${COMP_LINE:0:COMP_POINT} word verb='' method='' repair='' before candidates typed
    word=${line##*[[:space:]]}
    local -a typed
    read -r -a typed <<< "${line%"$word"}"
    for before in "${typed[@]:1}"; do
        case $before in
            method=*) method=${before#method=} ;;
            repair=* | surgery=*) repair=${before/=/:} ;;
            -*) ;;
            *=*) ;;
            *) [[ -n $verb ]] || verb=$before ;;
        esac
    done
    if [[ $word == *=* ]]; then
        typed=${word%%=*}=
        candidates=$(_suture_names "$typed")
        COMPREPLY=($(compgen -P "$typed" -W "$candidates" -- "${word#*=}"))
        case $typed in
            @PATHS@)
                COMPREPLY+=($(compgen -P "$typed" -f -- "${word#*=}")) ;;
        esac
    else
        [[ ${#typed[@]} -gt 1 && -z $verb ]] && verb=run
        candidates=$(_suture_names "$verb")
        case $verb in @CONFIGURED@)
            candidates+=" $(_suture_names "method:$method") $(_suture_names "$repair")" ;;
        esac
        COMPREPLY=($(compgen -W "$candidates" -- "$word"))
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace 2> /dev/null
    # readline takes what is behind an = for a word of its own
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
}

complete -o default -F _suture suture
