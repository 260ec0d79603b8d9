-- SPDX-License-Identifier: Apache-2.0
local progress = require "sm.cli.progress"

return {
    usage = "sm load [flags] [< FILE]",
    about = "Bring the images of an archive into the store: what `docker save`, `podman save`,\n"
        .. "skopeo or `sm save` wrote, compressed or not. Without -i it is read from stdin.",
    flags = {
        { "input", "i", "FILE", "read this file", kind = "string" },
        { "platform", nil, "OS/ARCH", "which of a multi-platform image", kind = "string" },
        progress.FLAG,
        { "quiet", "q", nil, "no progress" },
    },
    max = 0,
    run = function(o)
        if not o.input and require("luv").guess_handle(0) == "tty" then
            return nil, "load: standard input is a terminal; give a file with -i"
        end
        local bars, why = progress.new(o)
        if not bars then
            return nil, "load: " .. why
        end
        local list, err = require("sm.image").load(o.input or "-", { platform = o.platform,
            progress = function(e)
                bars:event(e)
            end })
        bars:finish()
        if not list then
            return nil, err
        end
        for _, one in ipairs(list) do
            for _, name in ipairs(one.names) do
                print("Loaded image: " .. name)
            end
            if #one.names == 0 then
                print("Loaded image ID: " .. one.digest)
            end
        end
        return 0
    end,
}
