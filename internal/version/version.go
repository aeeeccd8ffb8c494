// Package version says which build this is.
package version

import "runtime/debug"

// release is set by the linker (-X) for packages.
var release string

// String returns the release, or what the Go tool knows of the build.
func String() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
