-- SPDX-License-Identifier: Apache-2.0
return {
    usage = "sm save [flags] IMAGE [IMAGE…]",
    about = "Write images as an archive that `docker load`, podman, skopeo and `sm load` read,\n"
        .. "to stdout or a file. Digests stay as they are.",
    flags = {
        { "output", "o", "FILE", "write to this file (a folder for oci-dir)", kind = "string" },
        { "format", nil, "FORMAT", "docker-archive (default; an OCI archive as well), oci-archive, oci-dir",
            kind = "string" },
    },
    min = 1,
    needs = "an image",
    run = function(o, rest)
        if not o.output and o.format == "oci-dir" then
            return nil, "save: --format oci-dir needs a folder: -o DIR"
        elseif not o.output and require("luv").guess_handle(1) == "tty" then
            return nil, "save: standard output is a terminal; give a file with -o"
        end
        local ok, err = require("sm.image").save(rest, o.output or 1, { format = o.format })
        if not ok then
            return nil, err
        end
        return 0
    end,
}
