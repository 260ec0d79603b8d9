-- SPDX-License-Identifier: Apache-2.0
--
-- `sm run --warm`: the first run of a kind boots and saves, the next are copies.

local sm = require "sm"
local shell = require "support.shell"
local spec = require "support.vm"

describe("sm run --warm", function()
    local function run(tail)
        local code, out, err = spec.sm("run --warm -q --timeline " .. tail)
        return code, out, err
    end
    local function templates()
        local names = {}
        for _, s in ipairs((sm.snapshot.list())) do
            names[#names + 1] = s.name:match "^warm%-%x+$"
        end
        return names
    end
    local IMAGE = spec.image "one"

    local function forget()
        for _, name in ipairs(templates()) do
            assert(sm.snapshot.remove(name))
        end
    end

    setup(forget)

    teardown(function()
        forget()
        assert.same({}, spec.settled_leftovers())
    end)

    it("boots the first time and starts from the template from then on", function()
        local code, _, err = run(IMAGE .. " sh -c 'echo mine > /root/mark'")
        assert.equal(0, code, err)
        assert.matches("kernel entered", err)
        assert.equal(1, #templates())
        -- Another machine, and nothing of the run before.
        for i = 1, 2 do
            local out
            code, out, err = run(("--name warm%d %s sh -c 'hostname; ls /root; exit %d'"):format(i, IMAGE, i))
            assert.equal(i, code, err)
            assert.equal(("warm%d\n"):format(i), out)
            assert.matches("copy runs", err)
            assert.not_matches("kernel entered", err)
        end
        -- What is the run's own and no part of the kind goes to the copy.
        code, _, err = run("-p 38080:80 " .. IMAGE .. " true")
        assert.equal(0, code, err)
        assert.matches("copy runs", err)
        assert.not_matches("kernel entered", err)
        assert.equal(1, #templates())
    end)

    it("keeps a template for each configuration, and replaces one that is damaged", function()
        local image, check, name_of = assert(sm.image(IMAGE)), require("sm.config").check, require("sm.warm").name
        local name = assert(name_of(image, assert(check { name = "another", hostname = "too" })))
        assert.same({ name }, templates())
        for _, cfg in ipairs { { memory = "128M" }, { cpus = 2 }, { append = "quiet" }, { net = "none" }, { kernel = "stock" } } do
            assert.not_equal(name, name_of(image, assert(check(cfg))))
        end
        local path = sm.snapshot.path(name)
        shell.run(("chmod 600 %s && truncate -s 1M %s"):format(path, path))
        local code, _, err = run(IMAGE .. " true")
        assert.equal(0, code, err)
        assert.matches("damaged.*; booting instead\n", err)
        assert.matches("kernel entered", err)
        code, _, err = run(IMAGE .. " true")
        assert.equal(0, code, err)
        assert.matches("copy runs", err)
        assert.same({ name }, templates())
    end)

    it("refuses what cannot be copied before anything runs", function()
        local code, _, err = run("--net tap=none0 " .. IMAGE .. " true")
        assert.equal(125, code)
        assert.equal("sm: warm: a tap network cannot be copied; only user networks can\n", err)
    end)
end)
