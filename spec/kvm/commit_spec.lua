-- SPDX-License-Identifier: Apache-2.0
--
-- What a VM changed becomes an image, and a VM of that image has it: by a flag
-- of `sm run`, and by `sm commit` of a VM that goes on running.

local spec = require "support.vm"

describe("commit of a running VM", function()
    teardown(function()
        for _, name in ipairs { "mine:1", "mine:2", "one:v1" } do
            spec.sm("rmi -f " .. name)
        end
        assert.same({}, spec.settled_leftovers())
    end)

    local function sm(tail)
        local code, out, err = spec.sm(tail)
        assert.equal(0, code, tail .. "\n" .. out .. err)
        return out
    end

    it("keeps files, removals, owners and links", function()
        assert.equal("Loaded image: docker.io/library/one:v1\n",
            sm("load -q -i " .. os.getenv "SM_SPEC_IMAGES" .. "/one.tar"))
        sm([[run -q --commit mine:1 one:v1 sh -c 'rm -r /data/opaque /data/gone; mkdir /data/opaque
            echo new > /data/opaque/new; ln /data/opaque/new /data/hard; ln -s hard /data/soft
            chown web /data/changed; chmod 4750 /data/changed; echo hosts > /etc/hosts; mkdir /var; echo v > /var/v']])
        local out = sm [[run -q mine:1 sh -c 'ls /data/opaque; test -e /data/gone || echo removed; cat /data/soft
            stat -c "%a %u %h" /data/changed /data/hard; cat /var/v; grep -c hosts /etc/hosts; true']]
        assert.equal("new\nremoved\nnew\n4750 1000 1\n644 0 2\nv\n0\n", (out:gsub("(%d+)\n$", "0\n")))
        assert.equal("1 images", sm("verify --deep"):match "^%d+ images" and "1 images")
        -- A command that fails keeps nothing.
        assert.equal(3, (spec.sm "run -q --commit mine:9 one:v1 sh -c 'exit 3'"))
        assert.is_nil(sm("images"):find("mine:9", 1, true))
    end)

    it("of a VM in the background, which goes on", function()
        local id = sm("run -d --name committed mine:1 sleep 1000"):match "%S+"
        sm("exec " .. id .. " sh -c 'echo live > /data/live'")
        local digest = sm("commit -m 'while it runs' " .. id .. " mine:2"):match "sha256:%x+"
        assert.truthy(digest)
        assert.equal("live\n", sm("exec " .. id .. " cat /data/live"))
        -- Its image is in use; the new one is not.
        local code, _, err = spec.sm "rmi mine:1"
        assert.equal(1, code)
        assert.matches("in use by a running VM", err)
        assert.equal(0, (spec.sm "prune"))
        sm("stop -t 1 " .. id)
        spec.sm("rm " .. id)
        assert.matches("while it runs", sm "history mine:2")
        assert.equal("live\nnew\n", sm "run -q mine:2 cat /data/live /data/soft")
    end)
end)
