# Brings the pinned upstream sdist into the build tree: kvtc_read_upstream() and kvtc_fetch_upstream().

# Reads patches/UPSTREAM ("key: value" lines) into KVTC_UPSTREAM_{NAME,VERSION,ARCHIVE,SHA256,COMMIT}.
function(kvtc_read_upstream file)
    file(STRINGS "${file}" lines REGEX "^[a-z0-9.]+: ")
    foreach(pair "name=NAME" "version=VERSION" "sdist=ARCHIVE" "sha256=SHA256" "llama.cpp=COMMIT")
        string(REGEX MATCH "^([^=]+)=(.+)$" _ "${pair}")
        set(key "${CMAKE_MATCH_1}")
        set(variable "${CMAKE_MATCH_2}")
        set(found "")
        foreach(line IN LISTS lines)
            string(FIND "${line}" "${key}: " at)
            if(at EQUAL 0)
                string(LENGTH "${key}: " length)
                string(SUBSTRING "${line}" ${length} -1 found)
                string(STRIP "${found}" found)
            endif()
        endforeach()
        if(found STREQUAL "")
            message(FATAL_ERROR "kvtc: ${file} has no '${key}: ' line")
        endif()
        set(KVTC_UPSTREAM_${variable} "${found}" PARENT_SCOPE)
    endforeach()
endfunction()

# Stops unless `archive` has the pinned hash.
function(kvtc_verify_archive archive)
    file(SHA256 "${archive}" actual)
    if(NOT actual STREQUAL KVTC_UPSTREAM_SHA256)
        message(FATAL_ERROR "kvtc: sha256 mismatch: ${archive} has ${actual}, "
            "patches/UPSTREAM asks for ${KVTC_UPSTREAM_SHA256}; remove the file and configure again")
    endif()
endfunction()

# The Python that runs pip: KVTC_PYTHON, else the project's .venv, else the one on PATH.
function(kvtc_find_python result)
    if(KVTC_PYTHON)
        set(${result} "${KVTC_PYTHON}" PARENT_SCOPE)
        return()
    endif()
    foreach(candidate "${KVTC_SOURCE_DIR}/.venv/bin/python" "${KVTC_SOURCE_DIR}/.venv/Scripts/python.exe")
        if(EXISTS "${candidate}")
            set(${result} "${candidate}" PARENT_SCOPE)
            return()
        endif()
    endforeach()
    find_program(KVTC_PYTHON_ON_PATH NAMES python3 python)
    if(NOT KVTC_PYTHON_ON_PATH)
        message(FATAL_ERROR "kvtc: no Python found to download upstream; set KVTC_PYTHON, or KVTC_UPSTREAM_SDIST to "
            "a local ${KVTC_UPSTREAM_ARCHIVE}")
    endif()
    set(${result} "${KVTC_PYTHON_ON_PATH}" PARENT_SCOPE)
endfunction()

# Downloads the sdist into `directory` from the index that the user's pip is set up for.
function(kvtc_download_upstream directory)
    kvtc_find_python(python)
    # pip reads the metadata of what it downloads, which for this sdist means importing its build backend.
    execute_process(COMMAND "${python}" -c "import pip, scikit_build_core"
        RESULT_VARIABLE status OUTPUT_QUIET ERROR_QUIET)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "kvtc: ${python} needs pip and scikit-build-core to download upstream "
            "(pip install scikit-build-core), or set KVTC_UPSTREAM_SDIST to a local ${KVTC_UPSTREAM_ARCHIVE}")
    endif()
    set(partial "${directory}/download")
    file(REMOVE_RECURSE "${partial}")
    file(MAKE_DIRECTORY "${partial}")
    message(NOTICE "-- kvtc: downloading ${KVTC_UPSTREAM_NAME} ${KVTC_UPSTREAM_VERSION} (sdist) with ${python}")
    execute_process(
        COMMAND "${python}" -m pip download --quiet --no-deps --no-binary "${KVTC_UPSTREAM_NAME}" --no-build-isolation
            --dest "${partial}" "${KVTC_UPSTREAM_NAME}==${KVTC_UPSTREAM_VERSION}"
        RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(NOT status EQUAL 0 OR NOT EXISTS "${partial}/${KVTC_UPSTREAM_ARCHIVE}")
        message(FATAL_ERROR "kvtc: could not download ${KVTC_UPSTREAM_ARCHIVE}; set KVTC_UPSTREAM_SDIST to a local "
            "copy to build offline. pip said:\n${output}")
    endif()
    kvtc_verify_archive("${partial}/${KVTC_UPSTREAM_ARCHIVE}")
    file(RENAME "${partial}/${KVTC_UPSTREAM_ARCHIVE}" "${directory}/${KVTC_UPSTREAM_ARCHIVE}")
    file(REMOVE_RECURSE "${partial}")
endfunction()

# Makes `directory`/<sdist name> hold the unpacked sdist. Sets in the caller:
#   KVTC_UPSTREAM_SDIST_FILE  the verified archive
#   KVTC_UPSTREAM_TREE        the unpacked tree, reused when it is already there
function(kvtc_fetch_upstream directory)
    if(KVTC_UPSTREAM_SDIST)
        set(archive "${KVTC_UPSTREAM_SDIST}")
        if(NOT EXISTS "${archive}")
            message(FATAL_ERROR "kvtc: KVTC_UPSTREAM_SDIST does not exist: ${archive}")
        endif()
    else()
        set(archive "${directory}/${KVTC_UPSTREAM_ARCHIVE}")
        if(NOT EXISTS "${archive}")
            kvtc_download_upstream("${directory}")
        endif()
    endif()
    kvtc_verify_archive("${archive}")

    string(REGEX REPLACE "\\.tar\\.gz$" "" name "${KVTC_UPSTREAM_ARCHIVE}")
    set(tree "${directory}/${name}")
    set(stamp "${directory}/unpacked.stamp")
    set(unpacked "")
    if(EXISTS "${stamp}" AND IS_DIRECTORY "${tree}")
        file(READ "${stamp}" unpacked)
    endif()
    if(NOT unpacked STREQUAL KVTC_UPSTREAM_SHA256)
        message(NOTICE "-- kvtc: unpacking ${KVTC_UPSTREAM_ARCHIVE}")
        # Into a folder of its own, then renamed, so that an interrupted run leaves nothing that looks whole.
        file(REMOVE_RECURSE "${tree}" "${directory}/unpacking" "${directory}/patched.stamp" "${directory}/patched-python.stamp")
        file(REMOVE "${stamp}")
        file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${directory}/unpacking")
        # The sdist ships a gitfile that points outside itself; git refuses to work below it.
        file(REMOVE "${directory}/unpacking/${name}/vendor/llama.cpp/.git")
        file(RENAME "${directory}/unpacking/${name}" "${tree}")
        file(REMOVE_RECURSE "${directory}/unpacking")
        file(WRITE "${stamp}" "${KVTC_UPSTREAM_SHA256}")
    endif()
    set(KVTC_UPSTREAM_SDIST_FILE "${archive}" PARENT_SCOPE)
    set(KVTC_UPSTREAM_TREE "${tree}" PARENT_SCOPE)
endfunction()
