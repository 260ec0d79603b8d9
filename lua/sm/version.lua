-- SPDX-License-Identifier: Apache-2.0
return "0.1.0"
