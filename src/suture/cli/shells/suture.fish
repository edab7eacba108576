# Completion of `suture` for fish, made by `suture completion fish`.
function __suture_names
    switch $argv[1]
@NAMES@
    end
end

function __suture
    set -l word (commandline -ct)
    set -l verb
    set -l method
    set -l repair
    for before in (commandline -opc)[2..]
        switch $before
            case 'method=*'
                set method (string replace 'method=' '' -- $before)
            case 'repair=*' 'surgery=*'
                set repair (string replace '=' ':' -- $before)
            case '-*' '*=*'
            case '*'
                test -n "$verb"; or set verb $before
        end
    end
    if string match -q '*=*' -- $word
        set -l key (string replace -r '=.*' '=' -- $word)
        for value in (__suture_names $key)
            echo $key$value
        end
        switch $key
            case @PATHS@
                for path in (string replace -r '[^=]*=' '' -- $word)*
                    echo $key$path
                end
        end
        return
    end
    if test (count (commandline -opc)) -gt 1; and test -z "$verb"
        set verb run
    end
    __suture_names "$verb"
    switch "$verb"
        case @CONFIGURED@
            __suture_names "method:$method"
            __suture_names "$repair"
    end
end

complete -c suture -f -a '(__suture)'
complete -c suture -n '__fish_seen_subcommand_from @FILES@' -F
