; The installer for one user, without an administrator: makensis -DVERSION=… -DFOLDER=… -DOUT=… cordee.nsi
; /S installs silently; /D=FOLDER, last and unquoted, chooses the folder.
Target amd64-unicode
Unicode true
!include MUI2.nsh
Name "Cordée"
OutFile "${OUT}"
InstallDir "$LOCALAPPDATA\Programs\Cordee"
RequestExecutionLevel user
SetCompressor zlib
ShowInstDetails show

!define MUI_WELCOMEPAGE_TEXT "$(welcome)"
!define MUI_FINISHPAGE_TEXT "$(done)"
!define MUI_FINISHPAGE_RUN "$INSTDIR\pythonw.exe"
!define MUI_FINISHPAGE_RUN_PARAMETERS "-X utf8 -m cordee.cli.main open"
!define MUI_FINISHPAGE_RUN_TEXT "$(open)"
!insertmacro MUI_PAGE_WELCOME
!insertmacro MUI_PAGE_COMPONENTS
!insertmacro MUI_PAGE_DIRECTORY
!insertmacro MUI_PAGE_INSTFILES
!insertmacro MUI_PAGE_FINISH
!insertmacro MUI_UNPAGE_CONFIRM
!insertmacro MUI_UNPAGE_INSTFILES
!insertmacro MUI_LANGUAGE "English"
!insertmacro MUI_LANGUAGE "French"
LangString welcome ${LANG_ENGLISH} "This installs Cordée ${VERSION} for you alone: no administrator is needed, and nothing is fetched from the internet."
LangString welcome ${LANG_FRENCH} "Installe Cordée ${VERSION} pour vous seul : sans administrateur, et sans rien chercher sur Internet."
LangString done ${LANG_ENGLISH} "If Windows asks whether Cordée may be reached from private networks, allow it: else this machine cannot work together with others."
LangString done ${LANG_FRENCH} "Si Windows demande si Cordée peut être joint depuis les réseaux privés, autorisez-le : sans cela, cette machine ne peut pas travailler avec d'autres."
LangString open ${LANG_ENGLISH} "Open the page"
LangString open ${LANG_FRENCH} "Ouvrir la page"
LangString node ${LANG_ENGLISH} "Start Cordée when I log on"
LangString node ${LANG_FRENCH} "Lancer Cordée à l'ouverture de session"

Section "Cordée"
  SectionIn RO
  SetOutPath "$INSTDIR"
  File /r "${FOLDER}/*"
  CreateDirectory "$SMPROGRAMS\Cordée"
  CreateShortcut "$SMPROGRAMS\Cordée\Cordée.lnk" "$INSTDIR\pythonw.exe" "-X utf8 -m cordee.cli.main open"
  CreateShortcut "$SMPROGRAMS\Cordée\Cordée (terminal).lnk" "$SYSDIR\cmd.exe" '/k "set PATH=$INSTDIR;%PATH%"'
  WriteUninstaller "$INSTDIR\uninstall.exe"
  !define KEY "Software\Microsoft\Windows\CurrentVersion\Uninstall\Cordee"
  WriteRegStr HKCU "${KEY}" "DisplayName" "Cordée"
  WriteRegStr HKCU "${KEY}" "DisplayVersion" "${VERSION}"
  WriteRegStr HKCU "${KEY}" "UninstallString" '"$INSTDIR\uninstall.exe"'
  WriteRegStr HKCU "${KEY}" "QuietUninstallString" '"$INSTDIR\uninstall.exe" /S'
SectionEnd

Section "$(node)"
  ; A task of this user with the rights of this user: `schtasks /SC ONLOGON` would want an administrator. Without
  ; the settings Windows would end it after three days, on battery, and not start it again.
  ReadEnvStr $1 "USERDOMAIN"
  ReadEnvStr $2 "USERNAME"
  FileOpen $0 "$INSTDIR\task.xml" w
  FileWriteUTF16LE /BOM $0 '<?xml version="1.0" encoding="UTF-16"?>$\r$\n'
  FileWriteUTF16LE $0 '<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">$\r$\n'
  FileWriteUTF16LE $0 '<Triggers><LogonTrigger><Enabled>true</Enabled><UserId>$1\$2</UserId></LogonTrigger></Triggers>$\r$\n'
  FileWriteUTF16LE $0 '<Principals><Principal id="Author"><UserId>$1\$2</UserId><LogonType>InteractiveToken</LogonType>'
  FileWriteUTF16LE $0 '<RunLevel>LeastPrivilege</RunLevel></Principal></Principals>$\r$\n'
  FileWriteUTF16LE $0 '<Settings><MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>'
  FileWriteUTF16LE $0 '<DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>'
  FileWriteUTF16LE $0 '<StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>'
  FileWriteUTF16LE $0 '<ExecutionTimeLimit>PT0S</ExecutionTimeLimit>'
  FileWriteUTF16LE $0 '<RestartOnFailure><Interval>PT1M</Interval><Count>999</Count></RestartOnFailure></Settings>$\r$\n'
  FileWriteUTF16LE $0 '<Actions Context="Author"><Exec><Command>"$INSTDIR\pythonw.exe"</Command>'
  FileWriteUTF16LE $0 '<Arguments>-X utf8 "$INSTDIR\node.pyw"</Arguments></Exec></Actions></Task>$\r$\n'
  FileClose $0
  nsExec::ExecToLog 'schtasks /Create /F /TN Cordee /XML "$INSTDIR\task.xml"'
  Pop $0
  nsExec::ExecToLog 'schtasks /Run /TN Cordee'
  Pop $0
SectionEnd

Section "Uninstall"
  nsExec::ExecToLog 'schtasks /End /TN Cordee'
  Pop $0
  nsExec::ExecToLog 'schtasks /Delete /F /TN Cordee'
  Pop $0
  Delete "$SMPROGRAMS\Cordée\*.lnk"
  RMDir "$SMPROGRAMS\Cordée"
  RMDir /r "$INSTDIR"
  DeleteRegKey HKCU "${KEY}"
  ; Models and the node's identity stay in $LOCALAPPDATA\cordee, as after `cordee uninstall`.
SectionEnd
