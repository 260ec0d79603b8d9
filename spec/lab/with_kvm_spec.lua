-- SPDX-License-Identifier: Apache-2.0
--
-- scripts/with-kvm: a command in the lab machine behaves as if it ran here.
-- Uses the shared machine (starting it if need be), except where a machine
-- must die: that one has a name of its own.

local shell = require "support.shell"

local dir, here

--- Run a script in which $L is the lab, $D a temporary folder, and
--- `until_ CONDITION` waits for a condition, at most a minute.
local function sh(script)
    return shell.run(([[
        D=%s L="%s/scripts/with-kvm --lab"
        until_() {
            for i in $(seq 300); do if eval "$1"; then return 0; fi; sleep 0.2; done
            echo "never: $1" >&2
            return 1
        }
    ]]):format(shell.quote(dir), here) .. script)
end

--- Exit status of a command in the lab, 128 + n for death by signal n.
local function status(command)
    return tonumber((sh("set +e; (exec " .. command .. ") 2>$D/stderr >&2; echo $?")))
end

local function lines(text)
    local list = {}
    for line in text:gmatch "[^\n]+" do
        list[#list + 1] = line
    end
    return list
end

describe("with-kvm", function()
    setup(function()
        here = shell.run("pwd -P"):gsub("\n", "")
        dir = shell.tmpdir()
        sh "$L true"
    end)

    teardown(function()
        shell.remove(dir)
    end)

    it("gives a real /dev/kvm", function()
        -- KVM_GET_API_VERSION is 0xAE00 and answers 12.
        shell.write(dir .. "/kvm.c", [[
            #include <fcntl.h>
            #include <sys/ioctl.h>
            int main(void) { return ioctl(open("/dev/kvm", O_RDWR), 0xAE00, 0); }
        ]])
        sh "cc -o $D/kvm $D/kvm.c"
        assert.equal(12, status "$L $D/kvm")
    end)

    it("lives through hundreds of first and last VMs", function()
        -- The kernel rewrites __schedule() at each (scripts/lab/hold_kvm.c).
        shell.write(dir .. "/vms.c", [[
            #include <fcntl.h>
            #include <sys/ioctl.h>
            #include <unistd.h>
            int main(void) {
                int kvm = open("/dev/kvm", O_RDWR);
                for (int i = 0; i < 300; i++) {
                    int vm = ioctl(kvm, 0xAE01, 0);
                    if (vm < 0 || close(vm)) return 1;
                    usleep(100);
                }
                return 0;
            }
        ]])
        sh "cc -o $D/vms $D/vms.c"
        -- It takes two CPUs, which is why the shared machine has one.
        sh [[
            own="${L% *} --name spec-two-$$ --memory 512M --lab"
            trap "SM_LAB_CPUS=2 $own --kill" EXIT
            SM_LAB_CPUS=2 timeout -k 1 120 $own $D/vms
        ]]
    end)

    it("passes exit codes and deaths by signal", function()
        assert.equal(7, status "$L sh -c 'exit 7'")
        assert.equal(127, status "$L no-such-command")
        assert.equal(126, status "$L /etc/passwd")
        assert.equal(143, status "$L sh -c 'kill -TERM $$'")
    end)

    it("keeps stdout and stderr apart", function()
        assert.equal("one\nthree\n", sh "$L sh -c 'echo one; echo two >&2; echo three' 2>$D/err")
        assert.equal("two\n", shell.read(dir .. "/err"))
    end)

    it("carries binary data through stdin and stdout", function()
        local out = lines(sh [[
            head -c 8388608 /dev/urandom >$D/data
            sha256sum <$D/data
            $L cat <$D/data | sha256sum
        ]])
        assert.equal(out[1], out[2])
    end)

    it("passes the working folder, arguments and environment", function()
        assert.equal(dir .. "\na b\ny  z\n0027\n", sh [[
            cd $D; umask 027
            SM_SPEC_WORD='a b' $L sh -c 'pwd; echo "$SM_SPEC_WORD"; echo "$1"; umask' x 'y  z'
        ]])
        assert.equal("/usr/share\n", sh "cd /usr/share && $L pwd")
    end)

    it("shares files both ways, executables and libraries included", function()
        local build = [[
            cd $D
            cc -shared -fPIC -o libanswer.so lib.c
            cc -o main main.c -L. -lanswer -Wl,-rpath,$D
        ]]
        shell.write(dir .. "/main.c", "int answer(void); int main(void) { return answer(); }")
        for answer = 42, 43 do
            shell.write(dir .. "/lib.c", ("int answer(void) { return %d; }"):format(answer))
            sh(build)
            assert.equal(answer, status "$L $D/main")
        end
        sh "$L sh -c 'echo written >$0/from-lab' $D"
        assert.equal("written\n", shell.read(dir .. "/from-lab"))
    end)

    it("protects the host's system folders", function()
        local name = "/etc/sm-spec-" .. dir:match "[^-]+$"
        assert.equal("x\n", sh("$L sh -c 'echo x >$0 && cat $0; rm $0' " .. name .. "; [ ! -e " .. name .. " ]"))
        sh("$L sh -c 'echo x >$0' " .. name .. "; [ ! -e " .. name .. " ]; $L rm " .. name)
    end)

    it("runs several commands at once", function()
        -- Each waits for a file that the other makes.
        sh [[
            cd $D
            $L sh -c 'touch a; while [ ! -e b ]; do sleep 0.1; done' &
            first=$!
            $L sh -c 'touch b; while [ ! -e a ]; do sleep 0.1; done'
            wait $first
        ]]
    end)

    it("stalls only the stream whose reader stops", function()
        -- 4 MiB to a stderr that nobody reads yet; stdout must get through.
        assert.equal("through\n4194304\n", sh [[
            mkfifo $D/fifo
            $L sh -c 'head -c 4194304 /dev/zero >&2 & echo through; wait' 2>$D/fifo >$D/out &
            lab=$!
            exec 9<$D/fifo
            until_ '[ -s $D/out ]'
            cat $D/out
            cat <&9 | wc -c
            wait $lab
        ]])
    end)

    it("tells the command that its reader is gone", function()
        assert.equal("y\n", sh "$L yes | head -n 1")
    end)

    it("passes signals", function()
        assert.equal("caught\n5\n", sh [[
            $L sh -c 'trap "echo caught; exit 5" TERM; touch $0/ready; while :; do sleep 0.1; done' $D &
            lab=$!
            until_ '[ -e $D/ready ]'
            kill -TERM $lab
            wait $lab || echo $?
        ]])
    end)

    it("leaves no process of a killed caller", function()
        -- The processes are found by the length of their sleep.
        sh [[
            long=31$$
            $L sh -c 'sleep $1 & setsid nohup sleep $1 & touch $0/started; wait' $D $long 2>/dev/null &
            lab=$!
            until_ '[ -e $D/started ]'
            $L pgrep -f "^sleep $long" >/dev/null
            kill -KILL $lab
            until_ '! $L pgrep -f "^sleep $long" >/dev/null'
        ]]
    end)

    it("reaches the caller's loopback, and is refused where the caller would be", function()
        assert.equal("hello\nConnection refused\n", sh [[
            echo hello >$D/hello
            socat -d -d TCP-LISTEN:0,bind=127.0.0.1,fork OPEN:$D/hello,rdonly 2>$D/log &
            server=$!
            until_ 'grep -q "listening on" $D/log'
            port=$(sed -n 's/.*listening on.*:\([0-9]*\)$/\1/p' $D/log)
            $L socat -u TCP:127.0.0.1:$port -
            kill $server
            wait $server || true
            $L socat -u TCP:127.0.0.1:$port - 2>&1 | grep -o 'Connection refused'
        ]])
    end)

    it("prefers a listener of its own, and publishes it", function()
        assert.equal("inside\n", sh [[
            echo inside >$D/inside
            echo outside >$D/outside
            port=$((20000 + $$ % 10000))
            out=$((port + 1))
            socat OPEN:$D/outside,rdonly TCP-LISTEN:$port,bind=127.0.0.1,reuseaddr,fork &
            outside=$!
            ${L% *} --publish $out:$port --lab sh -c '
                socat -d -d TCP-LISTEN:$1,bind=127.0.0.1,reuseaddr,fork OPEN:$0/inside,rdonly 2>$0/log2 &
                while [ ! -e $0/seen ]; do sleep 0.1; done
                kill $!' $D $port &
            lab=$!
            until_ 'grep -q "listening on" $D/log2'
            $L socat -u TCP:127.0.0.1:$port OPEN:$D/own,creat
            cmp $D/inside $D/own
            socat -u TCP:127.0.0.1:$out -
            touch $D/seen
            wait $lab
            kill $outside
        ]])
    end)

    it("has a disk with reflinks", function()
        sh [[$L sh -c 'cd $(mktemp -d -p "$SM_LAB_DISK") || exit
            head -c 1048576 /dev/urandom >one && cp --reflink=always one two && cmp one two
            status=$?; rm -r "$PWD"; exit $status']]
    end)

    it("gives a terminal to a terminal, with its size", function()
        assert.equal("31 91\n21 71\nworld\n", sh [[
            T="tmux -f /dev/null -L sm-spec-$$"
            trap '$T kill-server 2>/dev/null || true' EXIT
            cat >$D/inside.sh <<'END'
            cd "$1"
            stty size >one
            until [ "$(stty size)" != "31 91" ]; do sleep 0.2; done
            stty size >two
            read -r line
            echo "$line" >three
END
            $T new-session -d -x 91 -y 31 "$L sh $D/inside.sh $D 2>$D/tmux"
            until_ '[ -s $D/one ]'
            $T resize-window -x 71 -y 21
            until_ '[ -s $D/two ]'
            $T send-keys wolrd BSpace BSpace BSpace rld Enter
            until_ '[ -s $D/three ]'
            cat $D/one $D/two $D/three
        ]])
    end)

    it("outlives a machine that dies: the next call starts another", function()
        sh [[
            own="${L% *} --name spec-$$ --memory 512M --lab"
            trap '$own --stop' EXIT
            code=0
            $own sh -c 'echo o >/proc/sysrq-trigger; sleep 60' 2>$D/gone || code=$?
            [ $code = 125 ]
            grep -q 'with-kvm: .*lab machine' $D/gone
            $own true 2>$D/again
            grep -q 'starting a lab machine' $D/again
            # Killed from outside, it must not wedge the next call either.
            kill -KILL $($own --status | sed -n "s/.*spec-$$-.*qemu pid \([0-9]*\).*/\1/p")
            $own true 2>>$D/again
        ]]
    end)

    it("refuses unknown options and missing commands", function()
        assert.equal(125, status "$L --no-such true")
        assert.equal(125, status "$L")
        assert.equal(125, status "$L --memory lots true")
    end)
end)
