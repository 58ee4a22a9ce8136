"""The errors of the operating system in plain words: the reason, and the remedy."""

import errno

_FULL = "Free some space, or use a folder on another disk; nothing half-written was kept"
_PERMITTED = "Give this user the permission, or name another folder"
REMEDIES = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("this user's quota of the disk is used up", _FULL),
    errno.EFBIG: ("the file would be longer than the system allows", "Raise the limit (ulimit -f)"),
    errno.EACCES: ("this user may not use it", _PERMITTED),
    errno.EPERM: ("the system does not permit it", _PERMITTED),
    errno.EROFS: ("its disk is read-only", "Name a folder that can be written"),
    errno.ENOENT: ("it does not exist", "Check the path"),
    errno.EISDIR: ("it is a folder, and a file was expected", "Check the path"),
    errno.ENOTDIR: ("a file stands where a folder was expected", "Check the path"),
    errno.EEXIST: ("it exists already", "Move it away, or name another path"),
    errno.ENOTEMPTY: ("the folder is not empty", "Move it away, or name another path"),
    errno.ENAMETOOLONG: ("its name is too long for the disk", "Shorten the name"),
    errno.ELOOP: ("its links lead in a circle", "Remove the links"),
    errno.EMFILE: ("this process has too many open files", "Raise the limit (ulimit -n)"),
    errno.ENFILE: ("the machine has too many open files", "End other programs"),
    errno.EIO: ("the disk reports a fault", "Check the disk; restore the file from a copy"),
    errno.ESTALE: ("the network disk lost it", "Mount the disk anew, and repeat the command"),
    errno.ENXIO: ("it is no ordinary file", "Name a file or a folder"),
}
